"""Key-value caches for ONNX graphs: in-place, dynamic and sliding-window.

Shapes: B rows, R rows of a step, K key-value heads, C capacity in tokens, L cached tokens, T new
tokens, H head size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import Signature, window_capacity
from gemma3_export.config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.runtimes.onnx.ort_values import ONNX_BFLOAT16, bfloat16_to_float32
from gemma3_export.runtimes.onnx.session import import_onnxruntime
from gemma3_export.runtimes.onnx.token_transfer import (
    HeadBuffer,
    TokenTransfer,
    allocate_cleared,
    clear,
    copier,
)
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVSegment,
    LayerKV,
    check_export,
    check_rows,
    check_segment,
    check_truncation,
    empty_lengths,
)

__all__ = ["DynamicCache", "InPlaceCache", "OnnxCache", "SlidingWindowCache"]


class OnnxCache(ABC):
    """A key-value cache that binds itself to a session.

    Args:
        config: the model's config.
        signature: the interface of the graph.
        device: where the tensors are.
        batch_size: rows.
        capacity: tokens that each row can hold.

    Raises:
        InputError: the batch is empty, or the capacity exceeds the model's context.
    """

    def __init__(
        self,
        config: Gemma3Config,
        signature: Signature,
        device: Device,
        batch_size: int,
        capacity: int,
    ) -> None:
        self.lengths = empty_lengths(config, batch_size, capacity)
        self.capacity = capacity
        self.signature = signature
        self.device = device
        name = signature.past_keys[0].dtype
        self.is_bfloat16 = name == "bfloat16"
        # numpy has no bfloat16: its memory is allocated as integers of the same size
        self.dtype = np.dtype("uint16" if self.is_bfloat16 else name)
        heads, size = config.num_key_value_heads, config.head_dim
        self.transfer = TokenTransfer(device, self.dtype, name, len(signature.past), heads, size)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def layout(self) -> str:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return self.transfer.layout

    @property
    def kv_bytes_per_token(self) -> int:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return self.transfer.kv_bytes_per_token

    def tokens_within(self, size_bytes: int) -> int:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return size_bytes // self.kv_bytes_per_token

    @abstractmethod
    def read(self, row: int) -> list[LayerKV]:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""

    @abstractmethod
    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""

    @abstractmethod
    def swap(self, row: int, other: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""

    @abstractmethod
    def attention_mask(self, new_tokens: int, rows: range) -> IntArray:
        """Return the mask [R, S] of the tokens that the graph sees, new ones included."""

    @abstractmethod
    def binding(self, session: Any, rows: range) -> Any:
        """Return a binding of the past and present tensors of adjacent rows."""

    def begin(self, new_tokens: int, rows: range) -> None:  # noqa: B027 (most need nothing)
        """Prepare a step of adjacent rows."""

    @abstractmethod
    def advance(self, binding: Any, new_tokens: int, rows: range) -> None:
        """Take over what the graph wrote."""


class InPlaceCache(OnnxCache):
    """Preallocated buffers [B, K, C, H] that the graph reads as past and extends in place.

    GroupQueryAttention appends to a buffer if past and present share their memory. Rows may differ
    in length; row ``r`` holds its tokens at [0, lengths[r]).
    """

    def __init__(
        self,
        config: Gemma3Config,
        signature: Signature,
        device: Device,
        batch_size: int,
        capacity: int,
    ) -> None:
        super().__init__(config, signature, device, batch_size, capacity)
        self.element_type: Any = ONNX_BFLOAT16 if self.is_bfloat16 else self.dtype
        self.shapes = [
            (batch_size, config.num_key_value_heads, self.tensor_capacity(index), config.head_dim)
            for index, _ in enumerate(signature.past)
        ]
        self.arrays: list[np.ndarray[Any, Any]] = []  # the buffers' memory, on the CPU
        self.buffers = [self._allocate(shape) for shape in self.shapes]
        self.bindings: dict[range, Any] = {}

    def tensor_capacity(self, index: int) -> int:
        """Return how many tokens one tensor of the cache can hold."""
        del index
        return self.capacity

    def _allocate(self, shape: tuple[int, ...]) -> Any:
        ort = import_onnxruntime()
        if self.device.kind == "cpu":  # zeroed pages cost nothing until they are written
            try:
                self.arrays.append(np.zeros(shape, self.dtype))
            except (MemoryError, ValueError) as error:  # ValueError: larger than the address space
                size = math.prod(shape) * self.dtype.itemsize * len(self.shapes)
                raise Gemma3ExportError(
                    f"a cache of {self.batch_size} rows with {self.capacity} tokens needs about "
                    f"{size / 1e9:.1f} GB, which cannot be allocated; ask for fewer tokens or "
                    "prompts"
                ) from error
            return ort.OrtValue.ortvalue_from_numpy(self.arrays[-1])
        return allocate_cleared(shape, self.dtype, self.device)

    def attention_mask(self, new_tokens: int, rows: range) -> IntArray:
        """Return a right-padded mask [R, S], whose sums are the rows' lengths."""
        lengths = self.lengths[rows.start : rows.stop] + new_tokens
        return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)

    def binding(self, session: Any, rows: range) -> Any:
        """See :class:`OnnxCache`; the buffers never move, so bindings are reused."""
        if rows not in self.bindings:
            self.bindings[rows] = session.io_binding()
            self.bind(self.bindings[rows], rows)
        return self.bindings[rows]

    def bind(self, binding: Any, rows: range) -> None:
        """Bind the same memory as past and present."""
        kind, index = self.device.kind, self.device.index
        for past, present, buffer, (_, *extents) in zip(
            self.signature.past, self.signature.present, self.buffers, self.shapes, strict=True
        ):
            shape = [len(rows), *extents]
            pointer = buffer.data_ptr() + rows.start * self.dtype.itemsize * math.prod(extents)
            binding.bind_input(past.name, kind, index, self.element_type, shape, pointer)
            binding.bind_output(present.name, kind, index, self.element_type, shape, pointer)

    def advance(self, binding: Any, new_tokens: int, rows: range) -> None:
        """Count the tokens, which the graph has already written in place."""
        del binding
        self.lengths[rows.start : rows.stop] += new_tokens

    def read(self, row: int) -> list[LayerKV]:
        """Return one (key, value) per layer, [K, L, H] float32; of sliding layers the newest L."""
        tensors = [
            self._as_float32(buffer.numpy()[row, :, :held])
            for buffer, (held,) in zip(self.buffers, self._held(row), strict=True)
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _as_float32(self, array: np.ndarray[Any, Any]) -> NDArray[np.float32]:
        if self.is_bfloat16:
            return bfloat16_to_float32(array)
        return array.astype(np.float32, copy=True)

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; nothing is moved.

        On the CPU, attention reads nothing beyond a row's last token, whatever is there.
        """
        check_truncation(self, row, length)
        self.lengths[row] = length
        if not length and self.device.kind != "cpu":
            for buffer, size_bytes in zip(self.buffers, self._row_bytes(), strict=True):
                clear(self.device, buffer.data_ptr() + row * size_bytes, size_bytes)

    def swap(self, row: int, other: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""
        check_rows(self, row, other)
        if self.device.kind == "cpu":
            for array, counts in zip(self.arrays, self._held(row, other), strict=True):
                most = max(counts)
                moved = array[row, :, :most].copy()
                array[row, :, :most] = array[other, :, :most]
                array[other, :, :most] = moved
        else:
            self._swap_on_device(row, other)
        self.lengths[[row, other]] = self.lengths[[other, row]]

    def _held(self, *rows: int) -> list[tuple[int, ...]]:
        """Return how many tokens of each row each tensor holds."""
        counts = tuple(int(self.lengths[row]) for row in rows)
        return [counts] * len(self.buffers)

    def _swap_on_device(self, row: int, other: int) -> None:
        """Exchange whole rows, whose memory is contiguous, in one copy per tensor and direction."""
        copy = copier(self.device)
        for buffer, size_bytes, (_, *extents) in zip(
            self.buffers, self._row_bytes(), self.shapes, strict=True
        ):
            first, second = (buffer.data_ptr() + at * size_bytes for at in (row, other))
            moved = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(
                [1, *extents], self.dtype, self.device.kind, self.device.index
            )
            copy(first, moved.data_ptr(), size_bytes)
            copy(second, first, size_bytes)
            copy(moved.data_ptr(), second, size_bytes)

    def _row_bytes(self) -> list[int]:
        return [self.dtype.itemsize * math.prod(extents) for _, *extents in self.shapes]

    def export_tokens(self, row: int, start: int, stop: int) -> KVSegment:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        check_export(self, row, start, stop)
        return self.transfer.copy_out(self._head_buffers(row), start, stop)

    def load_tokens(self, row: int, segment: KVSegment, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        check_segment(self, row, segment, count)
        self.transfer.copy_in(segment, self._head_buffers(row), int(self.lengths[row]), count)
        self.lengths[row] += count

    def _head_buffers(self, row: int) -> list[HeadBuffer]:
        offset = row * self._row_bytes()[0]
        return [HeadBuffer(buffer.data_ptr() + offset, self.capacity) for buffer in self.buffers]


class DynamicCache(OnnxCache):
    """Tensors that a portable graph returns longer by the new tokens; they stay on the device.

    Rows are kept apart while they are prefilled one by one, and joined for steps of several rows.
    Shorter rows are then padded with a gap that the mask hides: positions count the ones of the
    mask, so a gap shifts nothing. Rows stay joined while the same rows are stepped.
    """

    def __init__(
        self,
        config: Gemma3Config,
        signature: Signature,
        device: Device,
        batch_size: int,
        capacity: int,
    ) -> None:
        super().__init__(config, signature, device, batch_size, capacity)
        empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), self.dtype)
        self.rows: list[list[Any]] = [
            [self._to_device(empty) for _ in signature.past] for _ in range(batch_size)
        ]
        self.joined_rows = range(0)  # their entries of ``rows`` are out of date
        self.joined: list[Any] = []
        self.mask: IntArray = np.zeros((0, 0), np.int64)  # of the joined rows

    def attention_mask(self, new_tokens: int, rows: range) -> IntArray:
        """Return the mask [R, S], with zeros over the gaps of joined rows."""
        new = np.ones((len(rows), new_tokens), np.int64)
        if len(rows) == 1:
            return np.ones((1, self.lengths[rows.start] + new_tokens), np.int64)
        self._join(rows)
        return np.concatenate((self.mask, new), axis=1)

    def binding(self, session: Any, rows: range) -> Any:
        """See :class:`OnnxCache`; ONNX Runtime allocates the present tensors."""
        binding = session.io_binding()
        if len(rows) > 1:
            self._join(rows)
            past = self.joined
        else:
            past = self._apart(rows.start)[rows.start]
        for spec, value in zip(self.signature.past, past, strict=True):
            binding.bind_ortvalue_input(spec.name, value)
        for spec in self.signature.present:
            binding.bind_output(spec.name, self.device.kind, self.device.index)
        return binding

    def advance(self, binding: Any, new_tokens: int, rows: range) -> None:
        """Keep the present tensors as the next past."""
        # outputs come in the order in which they were bound, the cache's first
        present = binding.get_outputs()[: len(self.signature.present)]
        if len(rows) > 1:
            self.joined = present
            new = np.ones((len(rows), new_tokens), np.int64)
            self.mask = np.concatenate((self.mask, new), axis=1)
        else:
            self.rows[rows.start] = present
        self.lengths[rows.start : rows.stop] += new_tokens

    def read(self, row: int) -> list[LayerKV]:
        """Return one (key, value) per layer, each [K, L, H] float32."""
        if row not in self.joined_rows:
            tensors = [value.numpy()[0] for value in self.rows[row]]
        else:
            index = self.joined_rows.index(row)
            keep = self.mask[index] != 0
            tensors = [value.numpy()[index][:, keep] for value in self.joined]
        tensors = [tensor.astype(np.float32, copy=True) for tensor in tensors]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; a joined row gets a larger gap."""
        check_truncation(self, row, length)
        if length and row in self.joined_rows:
            mask = self.mask[self.joined_rows.index(row)]
            mask &= mask.cumsum() <= length
        elif length < self.lengths[row]:
            rows = self._apart(row)
            rows[row] = [
                self._to_device(value.numpy()[:, :, :length].copy()) for value in rows[row]
            ]
        self.lengths[row] = length

    def swap(self, row: int, other: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; splits joined rows."""
        check_rows(self, row, other)
        self._apart(row)
        rows = self._apart(other)
        rows[row], rows[other] = rows[other], rows[row]
        self.lengths[[row, other]] = self.lengths[[other, row]]

    def export_tokens(self, row: int, start: int, stop: int) -> KVSegment:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`; splits joined rows."""
        check_export(self, row, start, stop)
        held = int(self.lengths[row])
        sources = [HeadBuffer(value.data_ptr(), held) for value in self._apart(row)[row]]
        return self.transfer.copy_out(sources, start, stop)

    def load_tokens(self, row: int, segment: KVSegment, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`; splits joined rows."""
        check_segment(self, row, segment, count)
        rows, held = self._apart(row), int(self.lengths[row])
        longer = [self.transfer.allocate(held + count) for _ in segment.tensors]
        targets = [HeadBuffer(value.data_ptr(), held + count) for value in longer]
        for value, target in zip(rows[row], targets, strict=True):
            self.transfer.copy(HeadBuffer(value.data_ptr(), held), target, held)
        self.transfer.copy_in(segment, targets, held, count)
        rows[row] = longer
        self.lengths[row] += count

    def _apart(self, row: int) -> list[list[Any]]:
        """Return the tensors of each row, after splitting joined rows if ``row`` is one of them."""
        if row in self.joined_rows:
            for index, joined in enumerate(self.joined_rows):
                keep = self.mask[index] != 0
                self.rows[joined] = [
                    self._to_device(value.numpy()[index : index + 1][:, :, keep])
                    for value in self.joined
                ]
            self.joined_rows, self.joined = range(0), []
        return self.rows

    def _join(self, rows: range) -> None:
        if rows == self.joined_rows:
            return
        for row in rows:
            self._apart(row)
        lengths = self.lengths[rows.start : rows.stop]
        longest = int(lengths.max())
        self.mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        for index in range(len(self.signature.past)):
            parts = []
            for row, length in zip(rows, lengths, strict=True):
                gap = ((0, 0), (0, 0), (0, longest - int(length)), (0, 0))
                parts.append(np.pad(self.rows[row][index].numpy(), gap))
            self.joined.append(self._to_device(np.concatenate(parts)))
        for row in rows:
            self.rows[row] = []
        self.joined_rows = rows

    def _to_device(self, array: np.ndarray[Any, Any]) -> Any:
        ort = import_onnxruntime()
        return ort.OrtValue.ortvalue_from_numpy(array, self.device.kind, self.device.index)


@dataclass(frozen=True, slots=True)
class EvictedTokens:
    """Tokens that a step evicted from one row's windows, kept in case the row is cut back."""

    first: int  # position of the first token
    until: int  # position after the last one
    tensors: dict[int, Any]  # buffer -> [K, until - first, H]


class SlidingWindowCache(InPlaceCache):
    """An in-place cache whose sliding layers hold their window and a margin, however long the text.

    GroupQueryAttention evicts old tokens itself (``sliding_window_cache``). Its contract: with a
    capacity C, a window W and G = C - W + 1, a row of T tokens holds the newest

        L(T) = T                          if T <= C
               T - G * ceil((T - C) / G)  otherwise

    of them, in order, from the start of its buffer. Full layers keep every token.

    A row can be cut back to where its last step began, if that step ran for this row alone and was
    no longer than the window; otherwise, only as far as nothing has been evicted since.
    """

    def __init__(
        self,
        config: Gemma3Config,
        signature: Signature,
        device: Device,
        batch_size: int,
        capacity: int,
    ) -> None:
        self.window_capacity = window_capacity(config)  # C
        self.group = self.window_capacity - config.sliding_window + 1  # G
        self.is_sliding = [
            config.is_sliding(layer) for layer in range(config.num_hidden_layers) for _ in "kv"
        ]
        self.evicted: dict[int, EvictedTokens] = {}  # by row, in the last step
        super().__init__(config, signature, device, batch_size, capacity)

    def tensor_capacity(self, index: int) -> int:
        """See :class:`InPlaceCache`."""
        return self.window_capacity if self.is_sliding[index] else self.capacity

    def tokens_within(self, size_bytes: int) -> int:
        """See :class:`InPlaceCache`; the windows of all rows are taken from it first."""
        tensor_bytes = self.kv_bytes_per_token // len(self.is_sliding)
        sliding = tensor_bytes * sum(self.is_sliding)
        full = self.kv_bytes_per_token - sliding
        left = max(0, size_bytes - sliding * self.window_capacity * self.batch_size)
        return (
            min(left // full, self.batch_size * self.capacity)
            if full
            else (self.batch_size * self.capacity if left else 0)
        )

    def first_held(self, length: int) -> int:
        """Return the position of the oldest token in sliding layers of a row of ``length``."""
        over = length - self.window_capacity
        return 0 if over <= 0 else self.group * -(-over // self.group)

    def begin(self, new_tokens: int, rows: range) -> None:
        """Save what a step of several tokens will evict: a draft may be wrong."""
        for row in rows:
            self.evicted.pop(row, None)
        if len(rows) > 1:
            return
        row = rows.start
        length = int(self.lengths[row])
        first, until = self.first_held(length), self.first_held(length + new_tokens)
        if first < until <= length and new_tokens > 1:
            tensors = {
                index: self.arrays[index][row, :, : until - first].copy()
                for index, sliding in enumerate(self.is_sliding)
                if sliding
            }
            self.evicted[row] = EvictedTokens(first, until, tensors)

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`.

        Raises:
            InputError: the row holds fewer tokens, or its windows have evicted too many since.
        """
        check_truncation(self, row, length)
        held, wanted = self.first_held(int(self.lengths[row])), self.first_held(length)
        if length and held != wanted:
            self._restore(row, held, wanted, length)
        self.lengths[row] = length
        self.evicted.pop(row, None)

    def _restore(self, row: int, held: int, wanted: int, length: int) -> None:
        """Move the start of the windows back from position ``held`` to ``wanted``."""
        lost = self.evicted.get(row)
        if lost is None or lost.until != held or lost.first > wanted:
            raise InputError(
                f"row {row} holds {self.lengths[row]} tokens, and its sliding layers no longer "
                f"hold what a cut to {length} needs; open the runtime with "
                "sliding_window_cache=False to cut back as far as you like"
            )
        for index, tensor in lost.tensors.items():
            buffer = self.arrays[index][row]
            kept = buffer[:, : max(0, length - held)]
            both = np.concatenate((tensor[:, wanted - lost.first :], kept), axis=1)
            buffer[:, : both.shape[1]] = both

    def swap(self, row: int, other: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; evicted tokens move along."""
        super().swap(row, other)
        moved = self.evicted.pop(row, None), self.evicted.pop(other, None)
        for evicted, at in zip(moved, (other, row), strict=True):
            if evicted is not None:
                self.evicted[at] = evicted

    def _held(self, *rows: int) -> list[tuple[int, ...]]:
        """See :class:`InPlaceCache`."""
        lengths = [int(self.lengths[row]) for row in rows]
        sliding = tuple(length - self.first_held(length) for length in lengths)
        return [sliding if is_sliding else tuple(lengths) for is_sliding in self.is_sliding]
