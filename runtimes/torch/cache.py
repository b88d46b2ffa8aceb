"""The preallocated key-value cache of the backends that run on torch.

Shapes: B rows, K key-value heads, C capacity in tokens, L cached tokens, T new tokens, H head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma3_export.config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.dtypes import DType, element_type
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVSegment,
    LayerKV,
    check_export,
    check_segment,
    check_truncation,
    describe_layout,
    empty_lengths,
)

__all__ = ["TorchCache", "as_numpy", "device_of", "dtype_of", "to_device"]


class TorchCache:
    """Buffers [B, K, C, H] a layer, filled from the left.

    Rows that are prefilled one by one end at different places; a batched step then writes all rows
    at the same place, behind the longest. The hole that this leaves in shorter rows is masked, and
    positions count the mask's ones, so it shifts nothing.
    """

    def __init__(
        self,
        config: Gemma3Config,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lengths: IntArray = empty_lengths(config, batch_size, capacity)
        self.capacity = capacity
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.buffers = [
            torch.zeros(shape, dtype=dtype, device=device)
            for _ in range(2 * config.num_hidden_layers)
        ]
        self.filled = np.zeros((batch_size, capacity), dtype=bool)
        self.ends: IntArray = np.zeros(batch_size, dtype=np.int64)  # behind each row's last token
        self.steps: Any = None  # gemma3_export.runtimes.torch.decode_steps.TorchDecodeSteps, if any

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    def prepare(self, new_tokens: int, row: int | None) -> tuple[Tensor, list[Tensor]]:
        """The mask [rows, S] and the past tensors [rows, K, S - T, H] of the next step."""
        rows = self._rows(row)
        if int(self.ends[rows].max()) + new_tokens > self.capacity:
            self.close_holes()
        start = int(self.ends[rows].max())
        new = np.ones((rows.stop - rows.start, new_tokens), dtype=bool)
        mask = np.concatenate((self.filled[rows, :start], new), axis=1)
        past = [buffer[rows, :, :start] for buffer in self.buffers]
        return to_device(mask.astype(np.int64), self.buffers[0].device), past

    def accept(self, present: list[Tensor], new_tokens: int, row: int | None) -> None:
        """Keep the new tokens of what a step returned, [rows, K, S, H] each."""
        rows = self._rows(row)
        start = int(self.ends[rows].max())
        stop = start + new_tokens
        for buffer, tensor in zip(self.buffers, present, strict=True):
            buffer[rows, :, start:stop] = tensor[:, :, start:]
        self.filled[rows, start:stop] = True
        self.ends[rows] = stop
        self.lengths[rows] += new_tokens

    def read(self, row: int) -> list[LayerKV]:
        """One (key, value) a layer, each [K, L, H], without holes."""
        keep = torch.from_numpy(np.flatnonzero(self.filled[row]))
        tensors = [
            as_numpy(buffer[row].index_select(1, keep.to(buffer.device))) for buffer in self.buffers
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; nothing is moved."""
        check_truncation(self, row, length)
        kept = np.flatnonzero(self.filled[row])[:length]
        self.filled[row] = False
        self.filled[row, kept] = True
        self.ends[row] = kept[-1] + 1 if length else 0
        self.lengths[row] = length

    @property
    def layout(self) -> str:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        buffer = self.buffers[0]
        _, heads, _, size = buffer.shape
        return describe_layout(
            len(self.buffers), (heads, size), dtype_of(buffer.dtype), str(buffer.device)
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return sum(buffer[0, :, 0].nbytes for buffer in self.buffers)

    def export_tokens(self, row: int, start: int, stop: int) -> KVSegment:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        check_export(self, row, start, stop)
        keep = torch.from_numpy(np.flatnonzero(self.filled[row])[start:stop])
        keep = keep.to(self.buffers[0].device)
        tensors = [buffer[row].index_select(1, keep) for buffer in self.buffers]
        size_bytes = sum(tensor.nbytes for tensor in tensors)
        return KVSegment(
            tensors=tensors, length=stop - start, layout=self.layout, size_bytes=size_bytes
        )

    def load_tokens(self, row: int, stored: KVSegment, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        check_segment(self, row, stored, count)
        if int(self.ends[row]) + count > self.capacity:
            self.close_holes()
        start = int(self.ends[row])
        stop = start + count
        for buffer, tensor in zip(self.buffers, stored.tensors, strict=True):
            buffer[row, :, start:stop] = tensor[:, :count]
        self.filled[row, start:stop] = True
        self.ends[row] = stop
        self.lengths[row] += count

    def _rows(self, row: int | None) -> slice:
        return slice(0, self.batch_size) if row is None else slice(row, row + 1)

    def append_one_each(self) -> None:
        """Count one more token of every row, written behind its last one."""
        self.filled[np.arange(self.batch_size), self.ends] = True
        self.ends += 1
        self.lengths += 1

    def close_holes(self) -> None:
        """Let every row hold its tokens at [0, its length)."""
        if np.array_equal(self.ends, self.lengths):
            return
        for row, length in enumerate(self.lengths):
            keep = torch.from_numpy(np.flatnonzero(self.filled[row]))
            for buffer in self.buffers:
                kept = buffer[row].index_select(1, keep.to(buffer.device))
                buffer[row, :, : int(length)] = kept
            self.filled[row] = np.arange(self.capacity) < length
        self.ends[:] = self.lengths


def dtype_of(dtype: torch.dtype) -> DType:
    """Return the element type that torch calls ``dtype``."""
    return element_type(str(dtype).removeprefix("torch.")).name


def device_of(device: torch.device) -> Device:
    """Return ``device`` as the command line names it; CUDA without an index is the first GPU."""
    return Device(device.type, device.index or 0)


def to_device(array: IntArray, device: torch.device) -> Tensor:
    """A copy on ``device``; nobody waits until it has arrived."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def as_numpy(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A host copy in float32, or in float64 when the tensor is float64."""
    if tensor.dtype != torch.float64:
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()
