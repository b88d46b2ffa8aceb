"""The signature of a cached decoder step: names, types and axes of its inputs and outputs.

The trace wrapper, exporters, runtimes, manifest and tests all iterate this definition instead of
parsing tensor names. Names and axes are those that optimum, transformers.js and onnxruntime-genai
expect from a decoder. The past may be empty, and positions come from the mask, so there are no
``position_ids``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import DType

__all__ = ["MODEL_PREFIX", "WINDOW_MARGIN", "Axis", "Signature", "TensorSpec", "window_capacity"]

MODEL_PREFIX = "decoder"  # prefix of every weight's name in a trace and in a torch archive
WINDOW_MARGIN = 64  # tokens a sliding-window cache holds beyond its window, at most one window

Axis = int | str  # a fixed size, or the name of a dynamic one
CANDIDATES: tuple[tuple[str, DType], ...] = (
    ("rows", "int64"),
    ("ids", "int64"),
    ("logits", "float32"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, element type and axes of one graph input or output."""

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    optional: bool = False  # an input with a default

    def to_json(self) -> dict[str, object]:
        """Return the signature's entry in JSON output."""
        return {"name": self.name, "dtype": self.dtype, "axes": list(self.axes)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """Ordered inputs and outputs of one cached decoder step.

    ``past_keys``, ``past_values``, ``present_keys`` and ``present_values`` have one entry per
    layer.
    """

    input_ids: TensorSpec
    attention_mask: TensorSpec
    past_keys: tuple[TensorSpec, ...]
    past_values: tuple[TensorSpec, ...]
    num_logits_to_keep: TensorSpec
    logits: TensorSpec
    present_keys: tuple[TensorSpec, ...]
    present_values: tuple[TensorSpec, ...]
    num_candidates: TensorSpec | None = None  # None unless the head is screened
    candidates: tuple[TensorSpec, ...] = ()  # rows, token ids and logits

    @classmethod
    def of(
        cls,
        config: Gemma3Config,
        *,
        cache_dtype: DType = "float32",
        is_windowed: bool = False,
        is_screened: bool = False,
        requires_num_logits: bool = False,
    ) -> Signature:
        """Return the signature of a decoder step of ``config``.

        Args:
            config: the model.
            cache_dtype: element type of keys and values.
            is_windowed: sliding layers have caches of fixed size: their window and a margin.
            is_screened: the head can return candidates instead of logits.
            requires_num_logits: ``num_logits_to_keep`` is a scalar without a default, which is what
                transformers.js looks for.
        """

        def cache(template: str, length: str) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    name=template.format(layer),
                    dtype=cache_dtype,
                    axes=(
                        "batch_size",
                        config.num_key_value_heads,
                        "window_capacity" if is_windowed and config.is_sliding(layer) else length,
                        config.head_dim,
                    ),
                )
                for layer in range(config.num_hidden_layers)
            )

        past, total = "past_sequence_length", "total_sequence_length"
        return cls(
            input_ids=TensorSpec(
                name="input_ids", dtype="int64", axes=("batch_size", "sequence_length")
            ),
            attention_mask=TensorSpec(
                name="attention_mask", dtype="int64", axes=("batch_size", total)
            ),
            past_keys=cache("past_key_values.{}.key", past),
            past_values=cache("past_key_values.{}.value", past),
            num_logits_to_keep=TensorSpec(
                name="num_logits_to_keep",
                dtype="int64",
                axes=() if requires_num_logits else (1,),
                optional=not requires_num_logits,
            ),
            logits=TensorSpec(
                name="logits",
                dtype="float32",
                axes=("batch_size", "kept_sequence_length", config.vocab_size),
            ),
            present_keys=cache("present.{}.key", total),
            present_values=cache("present.{}.value", total),
            num_candidates=TensorSpec(
                name="num_candidates", dtype="int64", axes=(1,), optional=True
            )
            if is_screened
            else None,
            candidates=tuple(
                TensorSpec(name=f"candidate_{name}", dtype=dtype, axes=("num_found",))
                for name, dtype in CANDIDATES
            )
            if is_screened
            else (),
        )

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """Cache inputs in graph order: key then value, layer by layer."""
        return tuple(_interleave(self.past_keys, self.past_values))

    @property
    def present(self) -> tuple[TensorSpec, ...]:
        """Cache outputs in graph order: key then value, layer by layer."""
        return tuple(_interleave(self.present_keys, self.present_values))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs in graph order."""
        optional = (self.num_logits_to_keep, self.num_candidates)
        present = [spec for spec in optional if spec is not None]
        return (self.input_ids, self.attention_mask, *self.past, *present)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs in graph order; ``logits`` comes first."""
        return (self.logits, *self.present, *self.candidates)

    def to_json(self) -> dict[str, object]:
        """Return the signature's entry in JSON output."""
        return {
            "inputs": [spec.to_json() | {"optional": spec.optional} for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }


def window_capacity(config: Gemma3Config) -> int:
    """Return the number of tokens that a sliding layer's cache of fixed size holds.

    The cache evicts old tokens once per as many steps as it holds tokens beyond the window.
    """
    return config.sliding_window + min(WINDOW_MARGIN, config.sliding_window)


def _interleave(keys: Iterable[TensorSpec], values: Iterable[TensorSpec]) -> Iterable[TensorSpec]:
    for key, value in zip(keys, values, strict=True):
        yield key
        yield value
