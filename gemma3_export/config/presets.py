"""Define the published Gemma 3 sizes: their configs and official repositories.

The numbers are from the official model cards and ``config.json`` files. The 4b and larger models
are multimodal; these configs describe their text model. Its embedding has 262,144 rows, which the
official checkpoints pad to 262,208 for image placeholders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma3_export.config.gemma3_config import Gemma3Config, default_layer_types
from gemma3_export.errors import InputError

__all__ = ["END_OF_TURN_ID", "SIZES", "TEXT_VOCAB_SIZE", "Preset", "preset", "preset_of"]

TEXT_VOCAB_SIZE = 262_144
END_OF_TURN_ID = 106


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A published model; ``size`` is a value of ``--size``."""

    size: str
    hub_id: str
    config: Gemma3Config


def _config(
    layers: int,
    hidden_size: int,
    intermediate_size: int,
    heads: tuple[int, int, int],
    *,
    query_pre_attn_scalar: int = 256,
    large: bool = True,
) -> Gemma3Config:
    num_attention_heads, num_key_value_heads, head_dim = heads
    return Gemma3Config(
        vocab_size=TEXT_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=131_072 if large else 32_768,
        sliding_window=1024 if large else 512,
        query_pre_attn_scalar=query_pre_attn_scalar,
        layer_types=default_layer_types(layers),
        rope_scaling_factor=8.0 if large else 1.0,
    )


_CONFIGS = {
    "270m": _config(18, 640, 2048, (4, 1, 256), large=False),
    "1b": _config(26, 1152, 6912, (4, 1, 256), large=False),
    "4b": _config(34, 2560, 10240, (8, 4, 256)),
    "12b": _config(48, 3840, 15360, (16, 8, 256)),
    "27b": _config(62, 5376, 21504, (32, 16, 128), query_pre_attn_scalar=168),
}

SIZES: tuple[str, ...] = tuple(size + suffix for size in _CONFIGS for suffix in ("", "-it"))


def preset(size: str) -> Preset:
    """Return the published model of a size such as ``270m``, ``270M`` or ``4b-it``.

    Raises:
        InputError: there is no such size.
    """
    given, size = size, size.lower()
    if size not in SIZES:
        raise InputError(f"unknown size {given!r:.80}; choose one of {', '.join(SIZES)}")
    base = size.removesuffix("-it")
    config = _CONFIGS[base]
    if size.endswith("-it"):
        config = replace(config, eos_token_id=(*config.eos_token_id, END_OF_TURN_ID))
        hub_id = f"google/gemma-3-{size}"
    else:
        hub_id = "google/gemma-3-270m" if base == "270m" else f"google/gemma-3-{base}-pt"
    return Preset(size=size, hub_id=hub_id, config=config)


# What weights must share with a published model to be derived from it; vocabularies and contexts
# change in fine-tuning.
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
)


def preset_of(config: Gemma3Config) -> Preset | None:
    """Return the published model that has the shape of ``config``, None if there is none.

    The instruction-tuned one is meant if the config stops at the end of a turn.
    """
    suffix = "-it" if END_OF_TURN_ID in config.eos_token_id else ""
    for size, published in _CONFIGS.items():
        if all(getattr(config, name) == getattr(published, name) for name in SHAPE):
            return preset(size + suffix)
    return None
