"""The key-value cache of portable ONNX graphs, which return it longer by the new tokens.

Shapes: B rows, K key-value heads, L cached tokens, T new tokens, H head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma3_export.bundle.signature import Signature
from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.runtimes.onnx.caches import copies_of
from gemma3_export.runtimes.onnx.session import import_onnxruntime
from gemma3_export.runtimes.onnx.token_copies import HeadMemory, SharesByCopies
from gemma3_export.runtimes.protocol import (
    IntArray,
    LayerKV,
    StoredTokens,
    check_export,
    check_stored,
    check_truncation,
    empty_lengths,
)

__all__ = ["GrowingCache"]


class GrowingCache(SharesByCopies):
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

    def export_tokens(self, row: int, start: int, stop: int) -> StoredTokens:
        """See :class:`gemma3_export.runtimes.protocol.SharesTokens`; splits joined rows."""
        check_export(self, row, start, stop)
        held = int(self.lengths[row])
        sources = [HeadMemory(value.data_ptr(), held) for value in self._split()[row]]
        return self.copies.take(sources, start, stop)

    def load_tokens(self, row: int, stored: StoredTokens, count: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.SharesTokens`; splits joined rows."""
        check_stored(self, row, stored, count)
        rows, held = self._split(), int(self.lengths[row])
        longer = [self.copies.allocate(held + count) for _ in stored.tensors]
        targets = [HeadMemory(value.data_ptr(), held + count) for value in longer]
        for value, target in zip(rows[row], targets, strict=True):
            self.copies.copy(HeadMemory(value.data_ptr(), held), target, held)
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
