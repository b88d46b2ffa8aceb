"""Store the logits of many positions outside memory.

A position of the official vocabulary takes 2 MB in float64, and a check compares several hundred.
They are computed once, one block of the vocabulary after the other, and read back by position.
Small models fit into memory; others use a temporary file without a name, which ends with its owner.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from gemma3_export.errors import Gemma3ExportError

__all__ = ["PositionKey", "StoredLogits"]

MEMORY_BYTES = 32 * 2**20  # larger stores move to a file

PositionKey = tuple[int, int]  # index of a sequence, position within it


class StoredLogits:
    """Logits [V] by sequence and position.

    Args:
        vocab_size: V.
        dtype: the floating-point dtype to store.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype = torch.float64) -> None:
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.rows: dict[PositionKey, int] = {}
        self._file = tempfile.SpooledTemporaryFile()  # noqa: SIM115 (kept)

    def __contains__(self, key: PositionKey) -> bool:
        return key in self.rows

    def missing(self, keys: Iterable[PositionKey]) -> list[PositionKey]:
        """Return the keys that are not stored, without repetition."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows]

    def add(self, keys: Sequence[PositionKey]) -> None:
        """Reserve a row for each key; :meth:`write` fills it."""
        for key in keys:
            self.rows[key] = len(self.rows)
        # Before the first write: one near the end would fill memory up to there.
        if len(self.rows) * self.vocab_size * self.dtype.itemsize > MEMORY_BYTES:
            self._file.rollover()

    def write(self, keys: Sequence[PositionKey], first_id: int, logits: Tensor) -> None:
        """Write the logits [P, v] of consecutive tokens from ``first_id`` on.

        Raises:
            Gemma3ExportError: the temporary folder is full.
        """
        values = logits.to(self.dtype).numpy()
        try:
            for key, row in zip(keys, values, strict=True):
                self._seek(key, first_id)
                self._file.write(row.tobytes())
        except OSError as error:
            needed = len(self.rows) * self.vocab_size * self.dtype.itemsize
            raise Gemma3ExportError(
                f"cannot store {needed / 1e6:,.0f} MB of expected logits in "
                f"{tempfile.gettempdir()}: {error.strerror}; free some space, or set TMPDIR to a "
                "folder on another disk"
            ) from error

    def read(self, keys: Sequence[PositionKey]) -> Tensor:
        """Return the logits [P, V] of ``keys`` in the stored dtype."""
        found = torch.empty(len(keys), self.vocab_size, dtype=self.dtype)
        row_bytes = self.vocab_size * self.dtype.itemsize
        for key, row in zip(keys, found.numpy(), strict=True):
            self._seek(key, 0)
            row[:] = np.frombuffer(self._file.read(row_bytes), row.dtype)
        return found

    def _seek(self, key: PositionKey, first_id: int) -> None:
        place = self.rows[key] * self.vocab_size + first_id
        self._file.seek(place * self.dtype.itemsize)
