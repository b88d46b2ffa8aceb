"""Random weights that need no file and no memory: for tests, timings and dry runs of big sizes."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.reference.weights.source import WeightSource

__all__ = ["RandomSource"]

BLOCK_ELEMENTS = 2**20  # drawn at once; part of what a seed means
NORM_STD = 0.1  # away from zero, so that multiplying by w instead of 1 + w shows


class RandomSource(WeightSource):
    """Normal float32 weights, each block a function of seed, tensor name and row alone.

    Raises:
        InputError: the seed is negative or too large.
    """

    def __init__(self, config: Gemma3Config, seed: int) -> None:
        if not 0 <= seed < 2**63:
            raise InputError(f"the seed of random weights is {seed}; it must be within 0 and 2^63")
        self.config = config
        self.origin = f"random weights (seed {seed})"
        self._seed = seed

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See :meth:`WeightSource.read`."""
        start, stop = self._row_range(name, start, stop)
        shape = self._shape(name)
        rows = torch.empty((stop - start, *shape[1:]))
        step = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
        for first in range(start - start % step, stop, step):
            block = self._block(name, first // step, min(step, shape[0] - first))
            low, high = max(start, first), min(stop, first + len(block))
            rows[low - start : high - start] = block[low - first : high - first]
        return rows

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :meth:`WeightSource.stored_dtype`."""
        self._shape(name)
        return torch.float32

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`WeightSource.fingerprint`; the seed stands for the files."""
        return {"kind": "random", "location": f"seed {self._seed}", "files": {}}

    def _block(self, name: str, index: int, rows: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self._seed}:{name}:{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        shape = self._shape(name)
        std = NORM_STD if len(shape) == 1 else self.config.initializer_range
        return torch.randn((rows, *shape[1:]), generator=generator).mul_(std)
