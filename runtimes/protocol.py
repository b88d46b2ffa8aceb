"""The protocol of a backend: a cache, a step that advances it, typed facts and capabilities.

The generation loop, the parity check and the benchmark see backends only through this module.
Arrays that cross it are numpy; what stays on a device is internal to the backend.

Shapes: B rows of a cache, R rows of a step, T new tokens, V vocabulary, K key-value heads, L cached
tokens, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import BundleRuntime
from gemma3_export.config import Gemma3Config
from gemma3_export.device import CudaOptions, Device
from gemma3_export.dtypes import DType
from gemma3_export.errors import InputError

__all__ = [
    "NO_LOGITS",
    "CacheKind",
    "CacheVariants",
    "Float32MatMul",
    "IntArray",
    "KVCache",
    "KVSegment",
    "LayerKV",
    "Logits",
    "PaddedBatches",
    "PaddingSide",
    "ReleasesWeights",
    "Runtime",
    "RuntimeInfo",
    "RuntimeName",
    "TransferableCache",
    "check_capacity",
    "check_export",
    "check_rows",
    "check_segment",
    "check_step",
    "check_truncation",
    "count_logits",
    "describe_layout",
    "empty_lengths",
    "num_logits_to_keep",
]

IntArray = NDArray[np.int64]
Logits = NDArray[np.float32]
LayerKV = tuple[NDArray[np.float32], NDArray[np.float32]]  # key and value, each [K, L, H]

NO_LOGITS = -1  # the ``num_logits`` of a step that computes none; 0 means all

RuntimeName = BundleRuntime | Literal["transformers", "dry-run"]
CacheKind = Literal["full", "windowed"]  # windowed: sliding layers keep their newest tokens only
PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeInfo:
    """Facts about a loaded runtime: decisions read its fields, reports print :meth:`to_json`."""

    name: RuntimeName
    dtype: str  # export dtype of an ONNX graph ("int8"), otherwise the weights' element type
    compute_dtype: DType  # precision of activations; its rounding is the noise floor of parity
    device: Device
    versions: Mapping[str, str] = field(default_factory=dict)  # by distribution
    residual_dtype: DType | None = None  # of residual stream and norms; None: compute_dtype
    activation_dtype: DType | None = None  # 16-bit activations around quantized matrices
    is_quantized: bool = False  # matrices are stored in blocks of integers
    quantizes_activations: bool = False  # products of quantized matrices round their inputs
    computed_in: str | None = None  # precision of the kernels, in words
    target: str | None = None  # export target of the graph
    producer: str | None = None  # the other tool that made the graph
    cache: CacheKind | None = None
    has_screened_head: bool = False
    shares_weights: bool = False  # float matrices stay in the memory-mapped file
    providers: tuple[str, ...] = ()  # ONNX Runtime's execution providers, in order
    cuda: CudaOptions | None = None
    threads: int | None = None  # intra-op; None: the backend's default

    def to_json(self) -> dict[str, object]:
        """Return what reports print; facts that do not apply are left out."""
        optional: dict[str, object] = {
            "target": self.target,
            "made_by": self.producer,
            "cache": self.cache,
            "head": "screened" if self.has_screened_head else None,
            "weights": "shared" if self.shares_weights else None,
            "dtype": self.dtype,
            "activations": self.activation_dtype,
            "residual": self.residual_dtype,
            "computed_in": self.computed_in,
            "device": str(self.device),
            "providers": list(self.providers) or None,
            "cuda": asdict(self.cuda) if self.cuda else None,
        }
        known = {key: value for key, value in optional.items() if value is not None}
        return {"runtime": self.name, **self.versions, **known, "threads": self.threads}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSegment:
    """Keys and values of consecutive tokens, outside of any cache.

    They are the backend's own tensors [K, n, H] (or with a leading 1), on the device and in the
    dtype of the cache that they were copied from.
    """

    tensors: Sequence[Any]  # the key and the value of each layer in turn
    length: int  # n
    layout: str  # must equal the layout of the cache that loads them
    size_bytes: int


class KVCache(Protocol):
    """The keys and values of ``batch_size`` independent rows, each with its own length."""

    @property
    def batch_size(self) -> int:
        """Rows."""

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""

    @property
    def lengths(self) -> IntArray:
        """[B] tokens that each row holds."""

    def read(self, row: int) -> list[LayerKV]:
        """Return a copy of one (key, value) per layer of ``row``, without padding.

        Sliding layers may return the newest tokens only, at least their window.
        """

    def truncate(self, row: int, length: int) -> None:
        """Drop all but the first ``length`` tokens of ``row``; the next step continues there.

        A row can always be emptied (``length`` 0), and then serves another text: nothing of the
        former one, not even a NaN, reaches it.

        Raises:
            InputError: the row holds fewer tokens, or a sliding-window cache has evicted tokens
                that would be needed.
        """

    def swap(self, row: int, other: int) -> None:
        """Exchange two rows bit by bit, lengths included.

        Raises:
            InputError: a row does not exist.
        """


class Runtime(Protocol):
    """One backend with one loaded model."""

    @property
    def config(self) -> Gemma3Config:
        """The model's shapes and constants."""

    @property
    def info(self) -> RuntimeInfo:
        """Versions, precision, device and providers in use."""

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache of ``batch_size`` rows with room for ``capacity`` tokens each.

        Raises:
            InputError: ``capacity`` exceeds ``config.max_position_embeddings``.
        """

    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """Append tokens to the cache and return the logits of the last ``num_logits`` of them.

        ``input_ids`` is [R, T]: the R rows from ``row`` on take T tokens each, after those that
        they already hold; they may differ in length. The other rows neither change nor cost
        anything, except on devices that always compute every row.

        Returns:
            [R, num_logits, V] float32; ``num_logits`` 0 means all T, and ``NO_LOGITS`` none.

        Raises:
            InputError: a row has no room for T more tokens, T is 0, or the arguments do not match
                each other or the cache.
        """


def check_step(cache: KVCache, input_ids: IntArray, num_logits: int, row: int = 0) -> None:
    """Reject an invalid step, with the same message on every backend, before computing anything.

    Raises:
        InputError: see :meth:`Runtime.step`.
    """
    if input_ids.ndim != 2 or not len(input_ids):
        raise InputError(
            f"input_ids have the shape {list(input_ids.shape)}; a step takes [R, T], T tokens for "
            "each of R rows"
        )
    rows, new_tokens = input_ids.shape
    check_capacity(cache, new_tokens, row, rows)
    if num_logits != NO_LOGITS and not 0 <= num_logits <= new_tokens:
        raise InputError(
            f"num_logits is {num_logits}; a step of {new_tokens} tokens has logits for 1 to "
            f"{new_tokens}; 0 means all, and {NO_LOGITS} none"
        )


def count_logits(num_logits: int, new_tokens: int) -> int:
    """Return how many tokens of a step get logits; see :meth:`Runtime.step`."""
    return 0 if num_logits == NO_LOGITS else num_logits or new_tokens


def num_logits_to_keep(num_logits: int, new_tokens: int) -> int:
    """Return the model's argument of that name: 0 keeps all T tokens, and -T, minus all, none."""
    return -new_tokens if num_logits == NO_LOGITS else num_logits


def check_capacity(cache: KVCache, new_tokens: int, row: int, rows: int = 1) -> None:
    """Reject tokens that would not fit, before computing anything.

    Raises:
        InputError: there are none, a row does not exist, or it would exceed the capacity.
    """
    if new_tokens < 1:
        raise InputError(f"cannot run a step of {new_tokens} tokens; give at least one")
    check_rows(cache, row, row + rows - 1)
    longest = int(cache.lengths[row : row + rows].max(initial=0))
    if longest + new_tokens > cache.capacity:
        raise InputError(
            f"the cache holds {longest} of {cache.capacity} tokens and has no room for "
            f"{new_tokens} more; ask for fewer new tokens or create a larger cache"
        )


def check_rows(cache: KVCache, *rows: int) -> None:
    """Reject rows that the cache does not have.

    Raises:
        InputError: one does not exist.
    """
    for row in rows:
        if not 0 <= row < cache.batch_size:
            raise InputError(
                f"row {row} does not exist: the cache has {cache.batch_size} rows, numbered from 0"
            )


def check_truncation(cache: KVCache, row: int, length: int) -> None:
    """Reject a truncation to more tokens than the row holds.

    Raises:
        InputError: ``length`` is negative or more than the row holds.
    """
    held = int(cache.lengths[row])
    if not 0 <= length <= held:
        raise InputError(f"row {row} holds {held} tokens; it cannot be cut to {length}")


def check_export(cache: KVCache, row: int, start: int, stop: int) -> None:
    """Reject an export of tokens that the row does not hold.

    Raises:
        InputError: the row does not hold [``start``, ``stop``), or that range is empty.
    """
    held = int(cache.lengths[row])
    if not 0 <= start < stop <= held:
        raise InputError(f"row {row} holds {held} tokens; [{start}, {stop}) cannot be copied")


def check_segment(cache: TransferableCache, row: int, segment: KVSegment, count: int) -> None:
    """Reject tokens that do not fit a cache, before copying anything.

    Raises:
        InputError: the layouts differ, the segment holds fewer tokens, or the row has no room.
    """
    if segment.layout != cache.layout:
        raise InputError(
            f"stored tokens ({segment.layout}) do not fit into a cache of {cache.layout}; store "
            "them with the runtime that will use them"
        )
    if not 0 < count <= segment.length:
        raise InputError(f"cannot load {count} tokens of a segment of {segment.length}")
    check_capacity(cache, count, row)


def describe_layout(count: int, shape: tuple[int, int], dtype: str, device: str) -> str:
    """Return the ``layout`` of a cache of ``count`` tensors with ``shape`` (K, H)."""
    heads, size = shape
    return f"{count} tensors of {heads} x {size} {dtype} per token on {device}"


def empty_lengths(config: Gemma3Config, batch_size: int, capacity: int) -> IntArray:
    """Return the lengths [B] of a new cache, all zero.

    Raises:
        InputError: the batch is empty, or the capacity exceeds the model's context.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 < capacity <= config.max_position_embeddings:
        raise InputError(
            f"cannot create a cache of {capacity} tokens; this model's context is 1 to "
            f"{config.max_position_embeddings} tokens (max_position_embeddings)"
        )
    return np.zeros(batch_size, dtype=np.int64)


@runtime_checkable
class TransferableCache(KVCache, Protocol):
    """A cache whose tokens can be copied to another cache of the same layout."""

    @property
    def layout(self) -> str:
        """Number, shape, dtype and device of its tensors, equal for caches that share tokens."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Size of one token's keys and values."""

    def tokens_within(self, size_bytes: int) -> int:
        """Return how many tokens all rows together can hold in ``size_bytes`` of memory."""

    def export_tokens(self, row: int, start: int, stop: int) -> KVSegment:
        """Return a bitwise copy of the tokens [``start``, ``stop``) of ``row``, on the device.

        Raises:
            InputError: the row does not hold them.
        """

    def load_tokens(self, row: int, segment: KVSegment, count: int) -> None:
        """Append copies of the first ``count`` tokens of ``segment`` to ``row``, as a step would.

        Keys contain their position, so they must be loaded where they were, after the same tokens.

        Raises:
            InputError: the layouts differ, the segment holds fewer tokens, or there is no room.
        """


@runtime_checkable
class PaddedBatches(Protocol):
    """A runtime that can run a padded batch, as consumers other than our own loop do."""

    @property
    def padding_side(self) -> PaddingSide | None:
        """The side on which the graph takes padding; None if it takes no empty past."""

    def run_padded(
        self, input_ids: IntArray, attention_mask: IntArray
    ) -> tuple[Logits, list[NDArray[np.float32]]]:
        """Run a padded batch with an empty past.

        Args:
            input_ids: [B, T], padded on ``padding_side``.
            attention_mask: [B, T], 0 for padding.

        Returns:
            Logits [B, T, V], and the present key and value [B, K, T, H] of each layer in turn, or
            none if padding changes them although it changes no logits.
        """


@runtime_checkable
class Float32MatMul(Protocol):
    """A runtime that can also multiply quantized matrices by float32 activations, slowly."""

    def with_float32_matmul(self) -> Runtime | None:
        """Return the same graph with unquantized activations; None if they already are."""


@runtime_checkable
class ReleasesWeights(Protocol):
    """A runtime that can free its weights before it is deleted."""

    def release(self) -> None:
        """Free the weights. The runtime can run no other step, but its variants can be opened."""


@runtime_checkable
class CacheVariants(Protocol):
    """A runtime whose graph may have a variant with another kind of cache."""

    @property
    def uses_sliding_window_cache(self) -> bool:
        """Return True if the caches of sliding layers evict old tokens."""

    def with_other_cache(self) -> Runtime | None:
        """Return the variant with full instead of sliding-window caches, or vice versa.

        None if the bundle or ONNX Runtime has no such variant.
        """
