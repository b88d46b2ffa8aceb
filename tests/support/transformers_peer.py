"""Hugging Face's Gemma 3 with our weights: an independent implementation to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gemma3_export.bench.transformers_candidate import build_transformers_model
from gemma3_export.config import Gemma3Config


def transformers_peer(
    config: Gemma3Config,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return ``Gemma3ForCausalLM`` with copies of ``weights`` that require gradients."""
    model = build_transformers_model(config, lambda name: weights[name].clone(), dtype=dtype)
    return model.requires_grad_(True)
