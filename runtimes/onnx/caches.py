"""Key-value caches for ONNX graphs: what they promise, and the preallocated one of fused graphs.

Shapes: B rows, K key-value heads, C capacity in tokens, L cached tokens, T new tokens, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import Signature, window_capacity
from gemma3_export.config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.runtimes.onnx.session import ONNX_BFLOAT16, import_onnxruntime, widened
from gemma3_export.runtimes.onnx.token_transfer import HeadBuffer, SharesByCopies, TokenTransfer
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVSegment,
    LayerKV,
    check_export,
    check_segment,
    check_truncation,
    empty_lengths,
)

__all__ = [
    "DynamicCache",
    "InPlaceCache",
    "OnnxCache",
    "SlidingWindowCache",
    "copies_of",
]


class OnnxCache(Protocol):
    """A KV cache that knows how to bind itself to a session."""

    lengths: IntArray

    @property
    def batch_size(self) -> int:
        """Rows."""

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""

    def read(self, row: int) -> list[LayerKV]:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""

    def attention_mask(self, new_tokens: int, row: int | None) -> IntArray:
        """[rows, S] ones for the tokens that the graph will see, the new ones included."""

    def binding(self, session: Any, row: int | None) -> Any:
        """A binding of past and present tensors of one row, or of all."""

    def begin(self, new_tokens: int, row: int | None) -> None:
        """What has to be done before a step of one row, or of all."""

    def advance(self, binding: Any, new_tokens: int, row: int | None) -> None:
        """Take over what the graph wrote."""


def copies_of(
    config: Gemma3Config, signature: Signature, device: Device, dtype: np.dtype[Any]
) -> TokenTransfer:
    """How a cache with tensors of ``dtype`` in memory gives and takes tokens."""
    name = signature.past_keys[0].dtype
    heads, size = config.num_key_value_heads, config.head_dim
    return TokenTransfer(device, dtype, name, len(signature.past), heads, size)


class InPlaceCache(SharesByCopies):
    """Preallocated buffers [B, K, C, H] that the graph reads as past and extends in place.

    GroupQueryAttention appends to a buffer when past and present are the same memory. Rows may be
    of different length; row ``r`` holds its tokens at [0, lengths[r]).
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
        # numpy has no bfloat16: its memory is allocated as integers of the same size
        name = signature.past_keys[0].dtype
        self.is_bfloat16 = name == "bfloat16"
        self.dtype = np.dtype("uint16" if self.is_bfloat16 else name)
        self.element_type: Any = ONNX_BFLOAT16 if self.is_bfloat16 else self.dtype
        self.shapes = [
            (batch_size, config.num_key_value_heads, self.tensor_capacity(index), config.head_dim)
            for index, _ in enumerate(signature.past)
        ]
        self.arrays: list[np.ndarray[Any, Any]] = []  # the buffers' memory, on the CPU
        self.copies = copies_of(config, signature, device, self.dtype)
        self.buffers = [self._allocate(shape) for shape in self.shapes]
        self.bindings: dict[int | None, Any] = {}
        self.steps: Any = (
            None  # gemma3_export.runtimes.onnx.decode_steps.DeviceDecodeSteps, if it has any
        )

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    def tensor_capacity(self, index: int) -> int:
        """Tokens that one tensor of the cache has room for."""
        return self.capacity

    def _allocate(self, shape: tuple[int, ...]) -> Any:
        ort = import_onnxruntime()
        if self.device.kind == "cpu":  # zeroed pages cost nothing until they are written
            try:
                self.arrays.append(np.zeros(shape, self.dtype))
            except (MemoryError, ValueError) as error:  # the latter beyond any address
                size = math.prod(shape) * self.dtype.itemsize * len(self.shapes)
                raise Gemma3ExportError(
                    f"a cache of {self.batch_size} rows with {self.capacity} tokens needs about "
                    f"{size / 1e9:.1f} GB, which this machine does not give; ask for fewer "
                    "tokens or prompts"
                ) from error
            return ort.OrtValue.ortvalue_from_numpy(self.arrays[-1])
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), self.dtype, self.device.kind, self.device.index
        )

    def begin(self, new_tokens: int, row: int | None) -> None:
        """See :class:`OnnxCache`."""

    def attention_mask(self, new_tokens: int, row: int | None) -> IntArray:
        """[rows, S] each row's tokens stand first, so its sum is the row's length."""
        lengths = self._rows(row) + new_tokens
        return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)

    def binding(self, session: Any, row: int | None) -> Any:
        """See :class:`OnnxCache`; the buffers never move, so each binding is made once."""
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
        """Count the tokens; the graph has already written them in place."""
        self._rows(row)[:] += new_tokens

    def read(self, row: int) -> list[LayerKV]:
        """One (key, value) a layer, each [K, L, H] float32."""
        return self._read(row, [int(self.lengths[row])] * len(self.buffers))

    def _read(self, row: int, counts: Sequence[int]) -> list[LayerKV]:
        """The first ``counts`` tokens of each tensor."""
        tensors = [
            self._widen(buffer.numpy()[row, :, :count])
            for buffer, count in zip(self.buffers, counts, strict=True)
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _widen(self, array: np.ndarray[Any, Any]) -> NDArray[np.float32]:
        """A float32 copy."""
        if self.is_bfloat16:
            return widened(array)
        return array.astype(np.float32, copy=True)

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; nothing is moved."""
        check_truncation(self, row, length)
        self.lengths[row] = length

    def export_tokens(self, row: int, start: int, stop: int) -> KVSegment:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        check_export(self, row, start, stop)
        return self.copies.take(self._memory(row), start, stop)

    def load_tokens(self, row: int, stored: KVSegment, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        check_segment(self, row, stored, count)
        self.copies.give(stored, self._memory(row), int(self.lengths[row]), count)
        self.lengths[row] += count

    def _memory(self, row: int) -> list[HeadBuffer]:
        row_bytes = self.dtype.itemsize * math.prod(self.shapes[0][1:])
        offset = row * row_bytes
        return [HeadBuffer(buffer.data_ptr() + offset, self.capacity) for buffer in self.buffers]

    def _rows(self, row: int | None) -> IntArray:
        return self.lengths if row is None else self.lengths[row : row + 1]


# The key-value cache of portable ONNX graphs, which return it longer by the new tokens.
#
# Shapes: B rows, K key-value heads, L cached tokens, T new tokens, H head size.


class DynamicCache(SharesByCopies):
    """Tensors that the graph returns longer by the new tokens, on the device all the while.

    Rows are kept apart while they are prefilled one by one, and joined at the first batched step:
    shorter rows are filled up with a hole that the mask hides (positions count the mask's ones, so
    a hole shifts nothing).
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
        dtype = np.dtype(signature.past_keys[0].dtype)
        self.copies = copies_of(config, signature, device, dtype)
        empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), dtype)
        self.rows: list[list[Any]] | None = [
            [self._to_device(empty) for _ in signature.past] for _ in range(batch_size)
        ]
        self.joined: list[Any] = []
        self.mask: IntArray = np.zeros((batch_size, 0), np.int64)  # of the joined rows

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    def attention_mask(self, new_tokens: int, row: int | None) -> IntArray:
        """[rows, S] zeros over the holes of joined rows."""
        if row is not None:
            return np.ones((1, self.lengths[row] + new_tokens), np.int64)
        self._join()
        new = np.ones((self.batch_size, new_tokens), np.int64)
        return np.concatenate((self.mask, new), axis=1)

    def binding(self, session: Any, row: int | None) -> Any:
        """See :class:`OnnxCache`; the present is allocated by ONNX Runtime."""
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

    def begin(self, new_tokens: int, row: int | None) -> None:
        """See :class:`OnnxCache`."""

    def advance(self, binding: Any, new_tokens: int, row: int | None) -> None:
        """Keep the present as the next past."""
        # in the order in which they were bound: the cache's come first
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
        """One (key, value) a layer, each [K, L, H] float32."""
        if self.rows is not None:
            tensors = [value.numpy()[0] for value in self.rows[row]]
        else:
            keep = self.mask[row] != 0
            tensors = [value.numpy()[row][:, keep] for value in self.joined]
        tensors = [tensor.astype(np.float32, copy=True) for tensor in tensors]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; joined rows get another hole."""
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
        return self.copies.take(sources, start, stop)

    def load_tokens(self, row: int, stored: KVSegment, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`; splits joined rows."""
        check_segment(self, row, stored, count)
        rows, held = self._split(), int(self.lengths[row])
        longer = [self.copies.allocate(held + count) for _ in stored.tensors]
        targets = [HeadBuffer(value.data_ptr(), held + count) for value in longer]
        for value, target in zip(rows[row], targets, strict=True):
            self.copies.copy(HeadBuffer(value.data_ptr(), held), target, held)
        self.copies.give(stored, targets, held, count)
        rows[row] = longer
        self.lengths[row] += count

    def _split(self) -> list[list[Any]]:
        """Take joined rows apart again, without their holes."""
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
                hole = ((0, 0), (0, 0), (0, longest - int(length)), (0, 0))
                parts.append(np.pad(row[index].numpy(), hole))
            self.joined.append(self._to_device(np.concatenate(parts)))
        self.rows = None

    def _to_device(self, array: np.ndarray[Any, Any]) -> Any:
        ort = import_onnxruntime()
        return ort.OrtValue.ortvalue_from_numpy(array, self.device.kind, self.device.index)


# A cache whose sliding layers hold their window and a margin, however long the text is.
#
# GroupQueryAttention lets go of old tokens itself (``sliding_window_cache``). Its contract: with a
# capacity C, a window W and G = C - W + 1, a row of T tokens holds the newest
#
#     L(T) = T                          if T <= C
#            T - G * ceil((T - C) / G)  otherwise
#
# of them, in order, from the start of its buffer. Full layers keep everything, as in
# ``InPlaceCache``.


@dataclass(frozen=True, slots=True)
class EvictedTokens:
    """What a step pushed out of one row's windows, for a cut that wants it back."""

    first: int  # position of the first token
    until: int  # position after the last one
    tensors: dict[int, Any]  # buffer -> [K, until - first, H]


class SlidingWindowCache(InPlaceCache):
    """Preallocated buffers, those of sliding layers no longer than a window and a margin.

    Tokens can be cut off as far back as a row's last step began, if that step was of its own and
    no longer than the window, and otherwise as far as nothing has been let go of since.
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
        self.evicted: dict[int, EvictedTokens] = {}  # by row, of the last step
        super().__init__(config, signature, device, batch_size, capacity)

    def tensor_capacity(self, index: int) -> int:
        """See :class:`InPlaceCache`."""
        return self.window_capacity if self.is_sliding[index] else self.capacity

    def first_held(self, length: int) -> int:
        """Position of the oldest token that a sliding layer holds of a row of ``length``."""
        over = length - self.window_capacity
        return 0 if over <= 0 else self.group * -(-over // self.group)

    def begin(self, new_tokens: int, row: int | None) -> None:
        """Keep what a draft's step will push out, since the draft may be wrong."""
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
            InputError: the row does not hold so many tokens, or its window has gone on too far.
        """
        check_truncation(self, row, length)
        held, wanted = self.first_held(int(self.lengths[row])), self.first_held(length)
        if length and held != wanted:
            self._restore(row, held, wanted, length)
        self.lengths[row] = length
        self.evicted.pop(row, None)

    def _restore(self, row: int, held: int, wanted: int, length: int) -> None:
        """Let the windows begin at ``wanted`` again instead of ``held``."""
        lost = self.evicted.get(row)
        if lost is None or lost.until != held or lost.first > wanted:
            raise InputError(
                f"row {row} holds {self.lengths[row]} tokens, and its sliding layers no longer "
                f"hold what a cut to {length} needs; open the runtime with "
                "sliding_window_cache=False to cut as far back as you like"
            )
        for index, tensor in lost.tensors.items():
            buffer = self.arrays[index][row]
            kept = buffer[:, : max(0, length - held)]
            both = np.concatenate((tensor[:, wanted - lost.first :], kept), axis=1)
            buffer[:, : both.shape[1]] = both

    def read(self, row: int) -> list[LayerKV]:
        """One (key, value) a layer, each [K, L, H] float32; of sliding layers the newest L."""
        length = int(self.lengths[row])
        held = length - self.first_held(length)
        counts = [held if sliding else length for sliding in self.is_sliding]
        return self._read(row, counts)
