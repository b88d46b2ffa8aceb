"""Hugging Face's Gemma 3 with any weights: the peer of benchmarks and comparisons.

It needs torch and transformers, which nothing else in this package imports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gemma3_export.config.gemma3_config import EMBEDDING, HEAD, Gemma3Config
from gemma3_export.config.hugging_face import config_to_json

__all__ = ["build_transformers_model"]


def build_transformers_model(
    config: Gemma3Config,
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """``Gemma3ForCausalLM`` from the config.json that we write, in evaluation mode.

    Args:
        config: the model.
        read: a canonical weight by its name.
        dtype: of weights and computation.
        device: as torch names it.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    hf_config = Gemma3TextConfig(**config_to_json(config))
    with torch.device("meta"):
        model = Gemma3ForCausalLM(hf_config)
    weights = {name: read(name).to(dtype) for name, _ in config.weight_shapes()}
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    # RoPE tables and the embedding's scale are no weights; the meta device left them empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    embedding = model.model.embed_tokens
    embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    return model.to(device).eval().requires_grad_(False)
