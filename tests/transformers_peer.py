"""Hugging Face's Gemma 3 with our weights: the independent implementation to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma3_export.config import Gemma3Config
from gemma3_export.config_json import config_to_json


def transformers_peer(
    config: Gemma3Config,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> Any:
    """``Gemma3ForCausalLM`` built from the config.json that we write, in evaluation mode."""
    hf_config = Gemma3TextConfig(**config_to_json(config))
    hf_config._attn_implementation = attention
    with torch.device("meta"):
        model = Gemma3ForCausalLM(hf_config)
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    state = {**(tied if config.tie_word_embeddings else {}), **weights}
    parameters = {name: tensor.to(dtype).clone() for name, tensor in state.items()}
    model.load_state_dict(parameters, strict=True, assign=True)
    model.tie_weights()
    restore_buffers(model, hf_config)
    return model.eval()


def restore_buffers(model: Any, hf_config: Gemma3TextConfig) -> None:
    """Compute what a model made on the meta device lacks: RoPE tables and the embedding's scale."""
    rotary, embedding = model.model.rotary_emb, model.model.embed_tokens
    model.model.rotary_emb = type(rotary)(hf_config)
    embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
