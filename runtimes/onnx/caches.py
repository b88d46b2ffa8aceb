"""Key-value caches for ONNX graphs: what they promise, and the preallocated one of fused graphs.

Shapes: B rows, K key-value heads, C capacity in tokens, L cached tokens, T new tokens, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle.signature import Signature
from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.runtimes.onnx.session import import_onnxruntime
from gemma3_export.runtimes.onnx.token_copies import HeadMemory, SharesByCopies, TokenCopies
from gemma3_export.runtimes.onnx.values import ONNX_BFLOAT16, widened
from gemma3_export.runtimes.protocol import (
    IntArray,
    LayerKV,
    StoredTokens,
    check_export,
    check_stored,
    check_truncation,
    empty_lengths,
)

__all__ = ["OnnxCache", "SharedCache", "copies_of"]


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
) -> TokenCopies:
    """How a cache with tensors of ``dtype`` in memory gives and takes tokens."""
    name = signature.past_keys[0].dtype
    heads, size = config.num_key_value_heads, config.head_dim
    return TokenCopies(device, dtype, name, len(signature.past), heads, size)


class SharedCache(SharesByCopies):
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
            None  # gemma3_export.runtimes.onnx.decode_steps.DecodeSteps, if it has any
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

    def export_tokens(self, row: int, start: int, stop: int) -> StoredTokens:
        """See :class:`gemma3_export.runtimes.protocol.SharesTokens`."""
        check_export(self, row, start, stop)
        return self.copies.take(self._memory(row), start, stop)

    def load_tokens(self, row: int, stored: StoredTokens, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.SharesTokens`."""
        check_stored(self, row, stored, count)
        self.copies.give(stored, self._memory(row), int(self.lengths[row]), count)
        self.lengths[row] += count

    def _memory(self, row: int) -> list[HeadMemory]:
        row_bytes = self.dtype.itemsize * math.prod(self.shapes[0][1:])
        offset = row * row_bytes
        return [HeadMemory(buffer.data_ptr() + offset, self.capacity) for buffer in self.buffers]

    def _rows(self, row: int | None) -> IntArray:
        return self.lengths if row is None else self.lengths[row : row + 1]
