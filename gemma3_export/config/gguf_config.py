"""Read the model config from the metadata of a GGUF file."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from gemma3_export.config.gemma3_config import (
    MAX_LAYERS,
    Gemma3Config,
    LayerType,
    default_layer_types,
)
from gemma3_export.config.hugging_face import text_vocab_size
from gemma3_export.config.other_models import GGUF_ARCHITECTURES
from gemma3_export.config.presets import END_OF_TURN_ID, TEXT_VOCAB_SIZE
from gemma3_export.errors import InputError
from gemma3_export.gguf_file import GgufFile

__all__ = ["config_from_gguf"]

_ARCHITECTURE = "gemma3"
_LAYERS_27B = 62
_REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
)
_KNOWN = {
    *_REQUIRED,
    "attention.head_count_kv",
    "attention.value_length",
    "attention.sliding_window_pattern",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.causal",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "vocab_size",
    "mm.tokens_per_image",
    # Ollama's converter
    "rope.global.freq_base",
    "rope.local.freq_base",
}
_VISION = "vision."  # Ollama's files hold the vision tower too
# Ollama's converter writes these, and leaves out what its engine hard-codes.
_OLLAMA_MARKS = ("tokenizer.ggml.add_padding_token", "tokenizer.ggml.add_unknown_token")
_OLLAMA_LEAVES_OUT = ("attention.layer_norm_rms_epsilon",)
_LONG_CONTEXT, _LONG_CONTEXT_FACTOR = 131_072, 8.0  # of the published 4b, 12b and 27b
logger = logging.getLogger(__name__)


def config_from_gguf(reader: GgufFile) -> Gemma3Config:
    """Read the config from the metadata of a GGUF file and the shape of its embedding.

    Raises:
        InputError: the architecture is another one, or metadata is missing or not supported.
    """
    try:
        return _Metadata(reader).config()
    except InputError as error:
        raise InputError(f"{reader.path.name}: {error}") from error


class _Metadata:
    def __init__(self, reader: GgufFile) -> None:
        self.reader = reader

    def config(self) -> Gemma3Config:
        self._check_kind()
        hidden, layers = self._whole("embedding_length"), self._whole("block_count")
        heads, head_dim = self._whole("attention.head_count"), self._whole("attention.key_length")
        for key in ("value_length", "key_length_swa", "value_length_swa"):
            self._must_equal(f"attention.{key}", head_dim)
        for key in ("rope.dimension_count", "rope.dimension_count_swa"):
            self._must_equal(key, head_dim)
        self._must_equal("attention.causal", True)
        if not 0 < layers <= MAX_LAYERS:
            raise InputError(
                f"{_ARCHITECTURE}.block_count is {layers}; it must be between 1 and {MAX_LAYERS}"
            )
        # As hard-coded in llama.cpp: hidden/heads for the 27B, the head size for the others.
        scalar = hidden / max(heads, 1) if layers == _LAYERS_27B else head_dim
        token = "tokenizer.ggml.{}_token_id".format
        rows = self._embedding_rows(hidden)
        tokens: dict[str, Any] = {
            "pad_token_id": self._token_id(token("padding"), 0),
            "bos_token_id": self._token_id(token("bos"), 2),
            "eos_token_id": self._eos_ids(rows),
        }
        return Gemma3Config(
            vocab_size=text_vocab_size(rows, tokens),
            hidden_size=hidden,
            intermediate_size=self._whole("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self._whole("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self._whole("context_length"),
            sliding_window=self._whole("attention.sliding_window"),
            query_pre_attn_scalar=scalar,
            layer_types=self._layer_types(layers),
            rope_theta=self._rope_base("rope.freq_base", "rope.global.freq_base", 1_000_000.0),
            rope_local_base_freq=self._rope_base(
                "rope.freq_base_swa", "rope.local.freq_base", 10_000.0
            ),
            rope_scaling_factor=self._rope_factor(),
            rms_norm_eps=self._real("attention.layer_norm_rms_epsilon", 1e-6),
            **tokens,
        )

    def _check_kind(self) -> None:
        value = self.reader.value
        architecture = value("general.architecture")
        if architecture != _ARCHITECTURE:
            advice = GGUF_ARCHITECTURES.get(str(architecture), "")
            raise InputError(
                f"general.architecture is {architecture!r:.60}; only {_ARCHITECTURE} is supported"
                + (f": {advice}" if advice else "")
            )
        prefix = _ARCHITECTURE + "."
        own = [key for key in self.reader.fields if key.startswith(prefix)]
        for key in own:
            name = key.removeprefix(prefix)
            if name not in _KNOWN and not name.startswith(_VISION):
                shown = f"{self.reader.value(key)!r:.60}"
                raise InputError(f"{key} = {shown} may change the computation and is not supported")
        required = [key for key in _REQUIRED if not (self._is_ollama and key in _OLLAMA_LEAVES_OUT)]
        if missing := [key for key in required if prefix + key not in self.reader.fields]:
            raise InputError(f"metadata is missing: {', '.join(prefix + key for key in missing)}")

    @property
    def _is_ollama(self) -> bool:
        return any(mark in self.reader.fields for mark in _OLLAMA_MARKS)

    def _rope_base(self, key: str, ollama_key: str, default: float) -> float:
        """Read the base of RoPE under either name."""
        fields = {name: self._real(name, default) for name in (key, ollama_key) if self._has(name)}
        if len(set(fields.values())) > 1:
            raise InputError(
                f"{_ARCHITECTURE}.{key} and {_ARCHITECTURE}.{ollama_key} contradict each other "
                f"({', '.join(map(str, fields.values()))}); convert the model again"
            )
        return next(iter(fields.values()), default)

    def _has(self, key: str) -> bool:
        return f"{_ARCHITECTURE}.{key}" in self.reader.fields

    def _value(self, key: str, default: Any = None) -> Any:
        return self.reader.value(f"{_ARCHITECTURE}.{key}", default)

    def _whole(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # one entry per layer, all equal
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{_ARCHITECTURE}.{key} is {value!r:.60}; it must be an integer")
        return value

    def _real(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if not isinstance(value, float):
            raise InputError(f"{_ARCHITECTURE}.{key} is {value!r:.60}; it must be a number")
        if not np.isfinite(np.float32(value)):
            raise InputError(f"{_ARCHITECTURE}.{key} is {value!r}; it must be finite")
        # The value is a float32; take its shortest decimal: 1e-06 instead of 9.9999999e-07.
        return float(str(np.float32(value)))

    def _must_equal(self, key: str, expected: object) -> None:
        value = self._value(key, expected)
        if value != expected:
            raise InputError(
                f"{_ARCHITECTURE}.{key} is {value!r:.60}; only {expected!r} is supported here"
            )

    def _embedding_rows(self, hidden: int) -> int:
        shapes = {tensor.name: tensor.shape for tensor in self.reader.tensors}
        shape = shapes.get("token_embd.weight")
        if shape is None or len(shape) != 2:
            raise InputError(
                "the matrix token_embd.weight is missing; is this a vocabulary-only file?"
            )
        if shape[1] != hidden:
            raise InputError(
                f"token_embd.weight has shape {shape}, but embedding_length is {hidden}"
            )
        return shape[0]

    def _layer_types(self, layers: int) -> tuple[LayerType, ...]:
        key = "attention.sliding_window_pattern"
        pattern = self._value(key, 6)
        if isinstance(pattern, list) and len(pattern) == layers:
            return tuple("sliding_attention" if item else "full_attention" for item in pattern)
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
            return default_layer_types(layers, pattern)
        raise InputError(
            f"{_ARCHITECTURE}.{key} is {pattern!r:.60}; it must be a period, or one flag per layer"
        )

    def _rope_factor(self) -> float:
        kind = self._value("rope.scaling.type", "linear")  # llama.cpp's default
        if kind == "none":
            return 1.0
        if kind != "linear":
            raise InputError(
                f"{_ARCHITECTURE}.rope.scaling.type is {kind!r:.40}; only linear is supported"
            )
        if (
            self._is_ollama
            and not self._has("rope.scaling.factor")
            and self._whole("context_length") >= _LONG_CONTEXT
        ):
            logger.warning(
                "%s does not state its RoPE scaling, which Ollama leaves out; %g is used, as in "
                "the published models with a context of %d tokens. If it is another, pass --config",
                self.reader.path.name,
                _LONG_CONTEXT_FACTOR,
                _LONG_CONTEXT,
            )
            return _LONG_CONTEXT_FACTOR
        return self._real("rope.scaling.factor", 1.0)

    def _token_id(self, key: str, default: int) -> int:
        value = self.reader.value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{key} is {value!r:.60}; it must be an integer")
        return value

    def _eos_ids(self, rows: int) -> tuple[int, ...]:
        found = [self._token_id("tokenizer.ggml.eos_token_id", 1)]
        for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
            if key in self.reader.fields:
                found.append(self._token_id(key, 1))
        if self._token(1) == "<eos>":  # a fine-tune that ends with another token still knows it
            found.append(1)
        if rows >= TEXT_VOCAB_SIZE and self._ends_turns():
            found += [1, END_OF_TURN_ID]  # instruction-tuned models stop at both
        return tuple(sorted(set(found)))

    def _ends_turns(self) -> bool:
        template = self.reader.value("tokenizer.chat_template", "")
        return "<end_of_turn>" in str(template) and self._token(END_OF_TURN_ID) == "<end_of_turn>"

    def _token(self, token_id: int) -> object:
        tokens = self.reader.get_field("tokenizer.ggml.tokens")
        if tokens is None or tokens.size <= token_id:
            return None
        return tokens.contents(token_id)
