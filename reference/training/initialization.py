"""Create the initial model of a run: from a config that fits the data, or from weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gemma3_export.config import SIZES, Gemma3Config, default_layer_types, load_config, preset
from gemma3_export.errors import InputError
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.training.token_data import TokenData, tokenizer_fingerprint
from gemma3_export.reference.weights import WeightSource
from gemma3_export.tokenizer import load_tokenizer

__all__ = ["DEMO", "DEMO_CONFIG", "config_for_data", "model_from_config", "model_from_pretrained"]

DEMO = "demo"
# The last norms of the sublayers, before their outputs are added to the residual stream.
SUBLAYER_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
DEMO_CONFIG = Gemma3Config(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=1024,
    sliding_window=64,
    query_pre_attn_scalar=32,
    layer_types=default_layer_types(6, pattern=3),
)


def config_for_data(data: TokenData, size: str | None, config_path: Path | None) -> Gemma3Config:
    """Return the config of a size or a file, with the special token ids of the data.

    Args:
        data: determines the special token ids, and the vocabulary size of a named size.
        size: ``demo`` (about 1.4M parameters) or a published size.
        config_path: a ``config.json`` instead.

    Raises:
        InputError: both or neither are given, or the config's vocabulary is too small.
    """
    if (size is None) == (config_path is None):
        raise InputError(f"give one of --size ({DEMO}, {', '.join(SIZES)}) and --config")
    if config_path is not None:
        config = load_config(config_path)
        if config.vocab_size < data.meta.vocab_size:
            raise InputError(
                f"{config_path} has a vocabulary of {config.vocab_size}, but the data needs "
                f"{data.meta.vocab_size}; raise vocab_size or prepare the data again"
            )
        return _with_token_ids_of(config, data)
    config = DEMO_CONFIG if size == DEMO else preset(str(size)).config
    return replace(_with_token_ids_of(config, data), vocab_size=data.meta.vocab_size)


def model_from_config(config: Gemma3Config, seed: int) -> Gemma3:
    """Create a float32 model with random weights and small initial sublayer gains.

    Each sublayer ends in a norm. With a gain of one it adds unit variance to the residual stream
    whatever its weights are, which drowns embeddings of scale ``initializer_range``. The initial
    gains make all sublayers together add as much variance as the embeddings have.
    """
    model = Gemma3(config)
    model.initialize(torch.Generator().manual_seed(seed))
    embedding_rms = config.initializer_range * config.hidden_size**0.5
    gain = min(1.0, embedding_rms / (2 * config.num_hidden_layers) ** 0.5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(SUBLAYER_NORMS):
                weight.fill_(gain - 1.0)  # the model adds one
    return model


def model_from_pretrained(source: WeightSource, data: TokenData) -> Gemma3:
    """Load pretrained weights in float32, in training mode.

    Raises:
        InputError: the data was tokenized with another tokenizer than that of the weights.
    """
    file = source.tokenizer_file()
    if file is not None:
        if tokenizer_fingerprint(load_tokenizer(file)) != data.meta.tokenizer_fingerprint:
            raise InputError(
                f"{data.path} was tokenized with another tokenizer than that of {source.origin}; "
                f"prepare the data with: gemma3-export data ... --tokenizer {file}"
            )
    elif source.config.vocab_size < data.meta.vocab_size:
        raise InputError(
            f"{data.path} has a vocabulary of {data.meta.vocab_size}, but {source.origin} has only "
            f"{source.config.vocab_size} tokens; prepare the data with the tokenizer of the weights"
        )
    return load_reference(source, torch.float32).train().requires_grad_(True)


def _with_token_ids_of(config: Gemma3Config, data: TokenData) -> Gemma3Config:
    meta = data.meta
    bos = meta.eos_token_id if meta.bos_token_id is None else meta.bos_token_id
    tokenizer = data.tokenizer()
    pad = None if tokenizer is None else tokenizer.pad_token_id
    ends = [meta.eos_token_id]
    if tokenizer is not None and data.train_marks is not None and tokenizer.chat.exists:
        ends += tokenizer.chat.end_token_ids  # an answer ends there
    vocab_size = max(config.vocab_size, meta.vocab_size)
    return replace(
        config,
        vocab_size=vocab_size,
        bos_token_id=bos,
        eos_token_id=tuple(dict.fromkeys(ends)),
        pad_token_id=meta.eos_token_id if pad is None else pad,
    )
