"""The preallocated key-value cache of the torch backends.

Shapes: B rows, R rows of a step, K key-value heads, C capacity in tokens, L cached tokens, T new
tokens, H head size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gemma3_export.config import Gemma3Config
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVSegment,
    LayerKV,
    check_export,
    check_rows,
    check_segment,
    check_truncation,
    describe_layout,
    empty_lengths,
)
from gemma3_export.runtimes.torch.tensors import as_numpy, dtype_of, to_device

__all__ = ["TorchCache"]


class TorchCache:
    """Key and value buffers [B, K, C, H] per layer, filled from the left.

    Rows that are prefilled one by one end at different positions. A batched step then writes all
    rows at the same position, after the longest, which leaves a gap in shorter rows. The mask hides
    the gap; positions count the ones of the mask, so a gap shifts nothing.
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
        self.ends: IntArray = np.zeros(batch_size, dtype=np.int64)  # after each row's last token
        self.written: IntArray = np.zeros(batch_size, dtype=np.int64)  # the rest is zeros

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    def prepare(self, new_tokens: int, rows: slice) -> tuple[Tensor, list[Tensor]]:
        """Return the mask [R, S] and past tensors [R, K, S - T, H] of the next step."""
        if int(self.ends[rows].max()) + new_tokens > self.capacity:
            self.close_gaps()
        start = int(self.ends[rows].max())
        new = np.ones((rows.stop - rows.start, new_tokens), dtype=bool)
        mask = np.concatenate((self.filled[rows, :start], new), axis=1)
        past = [buffer[rows, :, :start] for buffer in self.buffers]
        return to_device(mask.astype(np.int64), self.buffers[0].device), past

    def accept(self, present: list[Tensor], new_tokens: int, rows: slice) -> None:
        """Store the new tokens of the present tensors [R, K, S, H] that a step returned."""
        start = int(self.ends[rows].max())
        stop = start + new_tokens
        for buffer, tensor in zip(self.buffers, present, strict=True):
            buffer[rows, :, start:stop] = tensor[:, :, start:]
        self.filled[rows, start:stop] = True
        self.ends[rows] = stop
        self.lengths[rows] += new_tokens
        self.written[rows] = np.maximum(self.written[rows], stop)

    def read(self, row: int) -> list[LayerKV]:
        """Return one (key, value) per layer, each [K, L, H], without gaps."""
        keep = torch.from_numpy(np.flatnonzero(self.filled[row]))
        tensors = [
            as_numpy(buffer[row].index_select(1, keep.to(buffer.device))) for buffer in self.buffers
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`; nothing is moved.

        Attention multiplies what the mask hides by zero, which leaves NaN where it was NaN, so an
        empty row is filled with zeros.
        """
        check_truncation(self, row, length)
        if not length:
            for buffer in self.buffers:
                buffer[row, :, : self.written[row]] = 0
            self.written[row] = 0
        kept = np.flatnonzero(self.filled[row])[:length]
        self.filled[row] = False
        self.filled[row, kept] = True
        self.ends[row] = kept[-1] + 1 if length else 0
        self.lengths[row] = length

    def swap(self, row: int, other: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""
        check_rows(self, row, other)
        pair, reverse = [row, other], [other, row]
        most = int(self.written[pair].max())
        for buffer in self.buffers:
            buffer[pair, :, :most] = buffer[reverse, :, :most]
        for array in (self.filled, self.ends, self.lengths, self.written):
            array[pair] = array[reverse]

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

    def tokens_within(self, size_bytes: int) -> int:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return size_bytes // self.kv_bytes_per_token

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

    def load_tokens(self, row: int, segment: KVSegment, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        check_segment(self, row, segment, count)
        if int(self.ends[row]) + count > self.capacity:
            self.close_gaps()
        start = int(self.ends[row])
        stop = start + count
        for buffer, tensor in zip(self.buffers, segment.tensors, strict=True):
            buffer[row, :, start:stop] = tensor[:, :count]
        self.filled[row, start:stop] = True
        self.ends[row] = stop
        self.lengths[row] += count
        self.written[row] = max(self.written[row], stop)

    def append_one_each(self, rows: range) -> None:
        """Count one more token per row of ``rows``, written after its last one.

        The other rows have been written there too.
        """
        self.written = np.maximum(self.written, self.ends + 1)
        for row in rows:
            self.filled[row, self.ends[row]] = True
            self.ends[row] += 1
            self.lengths[row] += 1

    def close_gaps(self) -> None:
        """Move every row's tokens to [0, its length)."""
        if np.array_equal(self.ends, self.lengths):
            return
        for row, length in enumerate(self.lengths):
            keep = torch.from_numpy(np.flatnonzero(self.filled[row]))
            for buffer in self.buffers:
                kept = buffer[row].index_select(1, keep.to(buffer.device))
                buffer[row, :, : int(length)] = kept
            self.filled[row] = np.arange(self.capacity) < length
        self.ends[:] = self.lengths
