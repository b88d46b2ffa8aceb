"""Model configuration: the dataclass, published sizes, and readers for every config dialect."""

from gemma3_export.config.gemma3_config import (
    EMBEDDING,
    HEAD,
    Gemma3Config,
    LayerType,
    default_layer_types,
)
from gemma3_export.config.hugging_face import (
    PADDED_VOCAB_SIZE,
    config_from_json,
    config_to_json,
    load_config,
    load_json_object,
)
from gemma3_export.config.presets import END_OF_TURN_ID, SIZES, TEXT_VOCAB_SIZE, Preset, preset

__all__ = [
    "EMBEDDING",
    "END_OF_TURN_ID",
    "HEAD",
    "PADDED_VOCAB_SIZE",
    "SIZES",
    "TEXT_VOCAB_SIZE",
    "Gemma3Config",
    "LayerType",
    "Preset",
    "config_from_json",
    "config_to_json",
    "default_layer_types",
    "load_config",
    "load_json_object",
    "preset",
]
