"""Tiny models with unusual constants, so that a confusion of two of them shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gemma3_export.config import Gemma3Config
from gemma3_export.config_json import config_to_json

TINY = Gemma3Config(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,  # 6 * 16 is not hidden_size
    max_position_embeddings=256,
    sliding_window=6,
    query_pre_attn_scalar=24,  # neither head_dim nor hidden_size / heads
    layer_types=(  # follows no pattern, begins and ends unlike the published models
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ),
    rope_theta=500_000.0,
    rope_local_base_freq=20_000.0,
    rope_scaling_factor=8.0,
    rms_norm_eps=1e-5,
    initializer_range=0.05,
    eos_token_id=(1, 7),
)


def tiny_config(**overrides: Any) -> Gemma3Config:
    """A five-layer model none of whose constants equals another's or a published default."""
    return replace(TINY, **overrides)


def tiny_weights(
    config: Gemma3Config, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Canonical name to tensor; norms lie around 0, as Gemma stores ``w`` of ``1 + w``."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.weight_shapes():
        std = 0.1 if len(shape) == 1 else config.initializer_range
        weights[name] = (torch.randn(shape, generator=generator) * std).to(dtype)
    return weights


def write_hf_folder(
    path: Path, config: Gemma3Config, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Write ``config.json`` and ``model.safetensors`` as Hugging Face would; return the weights."""
    path.mkdir(parents=True, exist_ok=True)
    weights = tiny_weights(config, seed, dtype)
    (path / "config.json").write_text(json.dumps(config_to_json(config)), encoding="utf-8")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return weights
