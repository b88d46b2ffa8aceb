"""Tiny models with unusual constants, so that mixing up two of them shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gemma3_export.config import Gemma3Config, config_to_json

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
    layer_types=(  # irregular, and unlike the published models at both ends
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
    """Return a five-layer config in which no constant equals another or a published default."""
    return replace(TINY, **overrides)


def tiny_weights(
    config: Gemma3Config, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return tensors by canonical name; norms are around 0: Gemma stores ``w`` of ``1 + w``."""
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


GGUF_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GGUF_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a canonical weight."""
    if name in GGUF_TOP_NAMES:
        return GGUF_TOP_NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def gguf_metadata(config: Gemma3Config) -> dict[str, Any]:
    """Return the ``gemma3.*`` metadata of ``config`` as llama.cpp's converter writes it."""
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [
            config.is_sliding(layer) for layer in range(config.num_hidden_layers)
        ],
        "rope.freq_base": config.rope_theta,
        "rope.freq_base_swa": config.rope_local_base_freq,
    }
    if config.rope_scaling_factor != 1.0:
        found["rope.scaling.type"] = "linear"
        found["rope.scaling.factor"] = config.rope_scaling_factor
    return found


def write_gguf(
    path: Path,
    config: Gemma3Config,
    weights: dict[str, torch.Tensor],
    quantization: str = "F32",
    *,
    architecture: str = "gemma3",
    metadata: dict[str, Any] | None = None,
    tokenizer: list[str] | None = None,
) -> None:
    """Write a GGUF file; matrices are quantized, norms are stored as ``1 + w`` in float32.

    ``metadata`` adds or replaces entries under ``gemma3.``; None removes one. ``tokenizer`` lists
    the tokens of an instruction-tuned model, which also gets a chat template.
    """
    import gguf
    from gguf.quants import quantize

    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (gguf_metadata(config) | (metadata or {})).items():
        _add_metadata(writer, f"{architecture}.{key}", value)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_eos_token_id(config.eos_token_id[0])
    if len(config.eos_token_id) > 1:
        writer.add_eot_token_id(config.eos_token_id[1])
    if tokenizer is not None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokenizer)
        writer.add_chat_template("<start_of_turn>...<end_of_turn>")
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values + 1.0)
        else:
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
