"""Key-value caches for ONNX graphs: in-place, dynamic and sliding-window.

Shapes: B rows, K key-value heads, C capacity in tokens, L cached tokens, T new tokens, H head size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
)
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVSegment,
    LayerKV,
    check_export,
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

    @abstractmethod
    def read(self, row: int) -> list[LayerKV]:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""

    @abstractmethod
    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""

    @abstractmethod
    def attention_mask(self, new_tokens: int, row: int | None) -> IntArray:
        """Return the mask [rows, S] of the tokens that the graph sees, new ones included."""

    @abstractmethod
    def binding(self, session: Any, row: int | None) -> Any:
        """Return a binding of the past and present tensors of one row, or of all."""

    def begin(self, new_tokens: int, row: int | None) -> None:  # noqa: B027 (most need nothing)
        """Prepare a step of one row, or of all."""

    @abstractmethod
    def advance(self, binding: Any, new_tokens: int, row: int | None) -> None:
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
        self.bindings: dict[int | None, Any] = {}

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

    def attention_mask(self, new_tokens: int, row: int | None) -> IntArray:
        """Return a right-padded mask [rows, S], whose sums are the rows' lengths."""
        lengths = self._rows(row) + new_tokens
        return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)

    def binding(self, session: Any, row: int | None) -> Any:
        """See :class:`OnnxCache`; the buffers never move, so bindings are reused."""
        if row not in self.bindings:
            self.bindings[row] = session.io_binding()
            self.bind(self.bindings[row], row)
        return self.bindings[row]

    def bind(self, binding: Any, row: int | None) -> None:
        """Bind the same memory as past and present."""
        first, rows = (0, self.batch_size) if row is None else (row, 1)
        kind, index = self.device.kind, self.device.index
        for past, present, buffer, (_, *extents) in zip(
            self.signature.past, self.signature.present, self.buffers, self.shapes, strict=True
        ):
            shape = [rows, *extents]
            pointer = buffer.data_ptr() + first * self.dtype.itemsize * math.prod(extents)
            binding.bind_input(past.name, kind, index, self.element_type, shape, pointer)
            binding.bind_output(present.name, kind, index, self.element_type, shape, pointer)

    def advance(self, binding: Any, new_tokens: int, row: int | None) -> None:
        """Count the tokens, which the graph has already written in place."""
        del binding
        self._rows(row)[:] += new_tokens

    def read(self, row: int) -> list[LayerKV]:
        """Return one (key, value) per layer, each [K, L, H] float32."""
        return self._read(row, [int(self.lengths[row])] * len(self.buffers))

    def _read(self, row: int, counts: Sequence[int]) -> list[LayerKV]:
        """Return copies of the first ``counts`` tokens of each tensor."""
        tensors = [
            self._as_float32(buffer.numpy()[row, :, :count])
            for buffer, count in zip(self.buffers, counts, strict=True)
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _as_float32(self, array: np.ndarray[Any, Any]) -> NDArray[np.float32]:
        if self.is_bfloat16:
            return bfloat16_to_float32(array)
        return array.astype(np.float32, copy=True)

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; nothing is moved."""
        check_truncation(self, row, length)
        self.lengths[row] = length

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
        row_bytes = self.dtype.itemsize * math.prod(self.shapes[0][1:])
        offset = row * row_bytes
        return [HeadBuffer(buffer.data_ptr() + offset, self.capacity) for buffer in self.buffers]

    def _rows(self, row: int | None) -> IntArray:
        return self.lengths if row is None else self.lengths[row : row + 1]


class DynamicCache(OnnxCache):
    """Tensors that a portable graph returns longer by the new tokens; they stay on the device.

    Rows are kept apart while they are prefilled one by one, and joined at the first batched step.
    Shorter rows are then padded with a gap that the mask hides: positions count the ones of the
    mask, so a gap shifts nothing.
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
        self.rows: list[list[Any]] | None = [
            [self._to_device(empty) for _ in signature.past] for _ in range(batch_size)
        ]
        self.joined: list[Any] = []
        self.mask: IntArray = np.zeros((batch_size, 0), np.int64)  # of the joined rows

    def attention_mask(self, new_tokens: int, row: int | None) -> IntArray:
        """Return the mask [rows, S], with zeros over the gaps of joined rows."""
        if row is not None:
            return np.ones((1, self.lengths[row] + new_tokens), np.int64)
        self._join()
        new = np.ones((self.batch_size, new_tokens), np.int64)
        return np.concatenate((self.mask, new), axis=1)

    def binding(self, session: Any, row: int | None) -> Any:
        """See :class:`OnnxCache`; ONNX Runtime allocates the present tensors."""
        binding = session.io_binding()
        if row is None:
            self._join()
            past = self.joined
        else:
            past = self._split()[row]
        for spec, value in zip(self.signature.past, past, strict=True):
            binding.bind_ortvalue_input(spec.name, value)
        for spec in self.signature.present:
            binding.bind_output(spec.name, self.device.kind, self.device.index)
        return binding

    def advance(self, binding: Any, new_tokens: int, row: int | None) -> None:
        """Keep the present tensors as the next past."""
        # outputs come in the order in which they were bound, the cache's first
        present = binding.get_outputs()[: len(self.signature.present)]
        if row is None:
            self.joined = present
            new = np.ones((self.batch_size, new_tokens), np.int64)
            self.mask = np.concatenate((self.mask, new), axis=1)
            self.lengths += new_tokens
            return
        assert self.rows is not None
        self.rows[row] = present
        self.lengths[row] += new_tokens

    def read(self, row: int) -> list[LayerKV]:
        """Return one (key, value) per layer, each [K, L, H] float32."""
        if self.rows is not None:
            tensors = [value.numpy()[0] for value in self.rows[row]]
        else:
            keep = self.mask[row] != 0
            tensors = [value.numpy()[row][:, keep] for value in self.joined]
        tensors = [tensor.astype(np.float32, copy=True) for tensor in tensors]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; a joined row gets a larger gap."""
        check_truncation(self, row, length)
        if self.rows is None:
            self.mask[row] &= self.mask[row].cumsum() <= length
        elif length < self.lengths[row]:
            self.rows[row] = [
                self._to_device(value.numpy()[:, :, :length].copy()) for value in self.rows[row]
            ]
        self.lengths[row] = length

    def export_tokens(self, row: int, start: int, stop: int) -> KVSegment:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`; splits joined rows."""
        check_export(self, row, start, stop)
        held = int(self.lengths[row])
        sources = [HeadBuffer(value.data_ptr(), held) for value in self._split()[row]]
        return self.transfer.copy_out(sources, start, stop)

    def load_tokens(self, row: int, segment: KVSegment, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`; splits joined rows."""
        check_segment(self, row, segment, count)
        rows, held = self._split(), int(self.lengths[row])
        longer = [self.transfer.allocate(held + count) for _ in segment.tensors]
        targets = [HeadBuffer(value.data_ptr(), held + count) for value in longer]
        for value, target in zip(rows[row], targets, strict=True):
            self.transfer.copy(HeadBuffer(value.data_ptr(), held), target, held)
        self.transfer.copy_in(segment, targets, held, count)
        rows[row] = longer
        self.lengths[row] += count

    def _split(self) -> list[list[Any]]:
        """Separate joined rows again, without their gaps."""
        if self.rows is None:
            self.rows = [
                [
                    self._to_device(value.numpy()[row : row + 1, :, self.mask[row] != 0])
                    for value in self.joined
                ]
                for row in range(self.batch_size)
            ]
            self.joined = []
        return self.rows

    def _join(self) -> None:
        if self.rows is None:
            return
        longest = int(self.lengths.max())
        self.mask = (np.arange(longest) < self.lengths[:, None]).astype(np.int64)
        for index in range(len(self.signature.past)):
            parts = []
            for row, length in zip(self.rows, self.lengths, strict=True):
                gap = ((0, 0), (0, 0), (0, longest - int(length)), (0, 0))
                parts.append(np.pad(row[index].numpy(), gap))
            self.joined.append(self._to_device(np.concatenate(parts)))
        self.rows = None

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

    def first_held(self, length: int) -> int:
        """Return the position of the oldest token in sliding layers of a row of ``length``."""
        over = length - self.window_capacity
        return 0 if over <= 0 else self.group * -(-over // self.group)

    def begin(self, new_tokens: int, row: int | None) -> None:
        """Save what a step of several tokens will evict: a draft may be wrong."""
        if row is None and self.batch_size > 1:
            self.evicted.clear()
            return
        row = row or 0
        self.evicted.pop(row, None)
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

    def read(self, row: int) -> list[LayerKV]:
        """Return one (key, value) per layer, [K, L, H] float32; of sliding layers the newest L."""
        length = int(self.lengths[row])
        held = length - self.first_held(length)
        counts = [held if sliding else length for sliding in self.is_sliding]
        return self._read(row, counts)
