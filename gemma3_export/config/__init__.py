"""Model configuration: the dataclass, published sizes, and readers for every config dialect."""

from gemma3_export.config.gemma3_config import (
    EMBEDDING,
    HEAD,
    Gemma3Config,
    LayerType,
    default_layer_types,
)
from gemma3_export.config.hugging_face import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PADDED_VOCAB_SIZE,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHTS_INDEX_NAME,
    config_from_json,
    config_to_json,
    load_config,
    load_json_object,
)
from gemma3_export.config.presets import (
    END_OF_TURN_ID,
    SIZES,
    TEXT_VOCAB_SIZE,
    Preset,
    preset,
    preset_of,
)

__all__ = [
    "CONFIG_NAME",
    "EMBEDDING",
    "END_OF_TURN_ID",
    "GENERATION_CONFIG_NAME",
    "HEAD",
    "PADDED_VOCAB_SIZE",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "SIZES",
    "TEXT_VOCAB_SIZE",
    "TOKENIZER_CONFIG_NAME",
    "TOKENIZER_NAME",
    "WEIGHTS_INDEX_NAME",
    "Gemma3Config",
    "LayerType",
    "Preset",
    "config_from_json",
    "config_to_json",
    "default_layer_types",
    "load_config",
    "load_json_object",
    "preset",
    "preset_of",
]
