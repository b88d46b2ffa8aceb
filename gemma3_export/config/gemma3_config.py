"""Define the configuration of a Gemma 3 text model.

Field names are those of Hugging Face's ``Gemma3TextConfig``. The module
:mod:`gemma3_export.config.hugging_face` reads and writes the JSON dialects, and
:mod:`gemma3_export.config.presets` has the published sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from gemma3_export.errors import InputError
from gemma3_export.limits import shown

__all__ = ["EMBEDDING", "HEAD", "MAX_LAYERS", "Gemma3Config", "LayerType", "default_layer_types"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # canonical names
MAX_LAYERS = 4096  # bounds the lists that a number in a file allocates

LayerType = Literal["sliding_attention", "full_attention"]


def default_layer_types(num_hidden_layers: int, pattern: int = 6) -> tuple[LayerType, ...]:
    """Return layer types in which every ``pattern``-th layer has full attention."""
    return tuple(
        "full_attention" if (index + 1) % pattern == 0 else "sliding_attention"
        for index in range(num_hidden_layers)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3Config:
    """The shapes and constants of a Gemma 3 text model.

    Raises:
        InputError: a value is out of range, or two values contradict each other.
    """

    vocab_size: int  # rows of the token embedding
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the gated feed-forward
    num_hidden_layers: int
    num_attention_heads: int  # query heads
    num_key_value_heads: int  # each is shared by a group of query heads
    head_dim: int  # width of a head; independent of hidden_size
    max_position_embeddings: int  # in tokens
    sliding_window: int  # keys visible to a sliding-window layer, including the query's own
    query_pre_attn_scalar: float  # attention scores are multiplied by its inverse square root
    layer_types: tuple[LayerType, ...]  # one per layer

    rope_theta: float = 1_000_000.0  # RoPE base of the full-attention layers
    rope_local_base_freq: float = 10_000.0  # RoPE base of the sliding-window layers
    rope_scaling_factor: float = 1.0  # linear RoPE scaling of the full-attention layers
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True  # the head shares the weight of the embedding
    initializer_range: float = 0.02  # standard deviation of random matrices

    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)  # any of these ends generation

    def __post_init__(self) -> None:
        self._check_positive()
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"layer_types has {len(self.layer_types)} entries, but num_hidden_layers is "
                f"{self.num_hidden_layers}; give one entry per layer"
            )
        for index, layer_type in enumerate(self.layer_types):
            if layer_type not in get_args(LayerType):
                raise InputError(
                    f"layer_types[{index}] is {layer_type!r:.80}; it must be "
                    f"{' or '.join(get_args(LayerType))}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim is {self.head_dim}; rotary embeddings require an even number"
            )
        token_ids = (self.pad_token_id, self.bos_token_id, *self.eos_token_id)
        if bad := [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]:
            raise InputError(
                f"special token ids {bad!s:.80} are outside the vocabulary of {self.vocab_size}; "
                "set pad_token_id, bos_token_id and eos_token_id"
            )

    def _check_positive(self) -> None:
        counts = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
        )
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise InputError(
                    f"{name} is {shown(value)}; it must be a positive integer below 2**31"
                )
        reals = (
            "query_pre_attn_scalar",
            "rope_theta",
            "rope_local_base_freq",
            "rope_scaling_factor",
            "rms_norm_eps",
            "initializer_range",
        )
        for name in reals:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise InputError(f"{name} is {value!r:.80}; it must be a positive finite number")

    @property
    def attention_scale(self) -> float:
        """Return the factor of the attention scores."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def query_size(self) -> int:
        """Return the total width of the query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Return the total width of the key heads, which is also that of the value heads."""
        return self.num_key_value_heads * self.head_dim

    def is_sliding(self, layer: int) -> bool:
        """Return True if ``layer`` attends only within the sliding window."""
        return self.layer_types[layer] == "sliding_attention"

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the canonical (Hugging Face) name and the shape of every weight, in model order."""
        hidden, head = self.hidden_size, self.head_dim
        yield EMBEDDING, (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "self_attn.q_proj.weight", (self.query_size, hidden)
            yield prefix + "self_attn.k_proj.weight", (self.key_value_size, hidden)
            yield prefix + "self_attn.v_proj.weight", (self.key_value_size, hidden)
            yield prefix + "self_attn.o_proj.weight", (hidden, self.query_size)
            yield prefix + "self_attn.q_norm.weight", (head,)
            yield prefix + "self_attn.k_norm.weight", (head,)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "pre_feedforward_layernorm.weight", (hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate_size, hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate_size, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, self.intermediate_size)
            yield prefix + "post_feedforward_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield HEAD, (self.vocab_size, hidden)

    @property
    def head_name(self) -> str:
        """Return the canonical name of the head's weight; if tied, that of the embedding."""
        return EMBEDDING if self.tie_word_embeddings else HEAD

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters; a tied head does not count twice."""
        return sum(math.prod(shape) for _, shape in self.weight_shapes())
