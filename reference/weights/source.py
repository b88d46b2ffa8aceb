"""The interface of weight sources, and random weights."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from gemma3_export.bundle import BlockFormat
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.gguf_file import GgufTensor
from gemma3_export.limits import MAX_SEED, check_integer

__all__ = [
    "RandomSource",
    "WeightSource",
    "check_finite",
]

DEFAULT_CHUNK_BYTES = 64 * 2**20


class WeightSource(ABC):
    """The weights of one model under their canonical names, in their stored precision.

    Reads are lazy: each reads only the requested rows.

    Attributes:
        config: the model; ``config.weight_shapes()`` lists names and shapes of all weights.
        origin: where the weights come from, for messages.
        skipped: stored names that are not weights of the text model (vision tower, buffers, a head
            equal to the embedding).
    """

    config: Gemma3Config
    origin: str
    skipped: tuple[str, ...] = ()

    @property
    def stored_rows(self) -> int:
        """Return how many embedding rows are stored, padding included."""
        return self.config.vocab_size

    @property
    def activation_blocks(self) -> Mapping[str, BlockFormat]:
        """Formats of the matrices whose inputs kernels round to int8, by canonical name."""
        return {}

    @property
    def smoothing(self) -> Mapping[str, torch.Tensor]:
        """Smoothing factors [K] of the inputs of some of those matrices, by canonical name."""
        return {}

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read rows [start, stop) of the canonical tensor ``name``, contiguous and on the CPU.

        Raises:
            InputError: the tensor or row does not exist, or the file cannot be read.
        """

    @abstractmethod
    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the element type that :meth:`read` gives: float32, float16 or bfloat16.

        Raises:
            InputError: the tensor does not exist.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return kind, location and SHA-256 of each file, without local folder names."""

    def tokenizer_file(self) -> Path | None:
        """Return the weights' ``tokenizer.json`` or GGUF file, None if there is none."""
        return None

    def generation_config(self) -> Mapping[str, Any] | None:
        """Return the weights' ``generation_config.json``, None if there is none."""
        return None

    def keep_rows(self, rows: int) -> None:
        """Keep ``rows`` embedding rows if that many are stored, because a tokenizer names them.

        Sources leave out rows that the weights' own tokenizer does not name.
        """
        del rows

    def gguf_tensor(self, name: str) -> GgufTensor | None:
        """Return the GGUF tensor of ``name``, None for other files.

        It may have more rows than the canonical tensor, and norms hold ``1 + w``.
        """
        del name
        return None

    def chunks(self, name: str, max_bytes: int = DEFAULT_CHUNK_BYTES) -> Iterator[torch.Tensor]:
        """Yield the tensor ``name`` in chunks of rows of at most ``max_bytes``, or of one row.

        Raises:
            InputError: the tensor does not exist.
        """
        shape = self._shape(name)
        row_bytes = math.prod(shape[1:]) * self.stored_dtype(name).itemsize
        step = max(1, max_bytes // row_bytes)
        for start in range(0, shape[0], step):
            yield self.read(name, start, min(start + step, shape[0]))

    def close(self) -> None:
        """Close the files."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.config.weight_shapes())

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise InputError(f"{self.origin} has no tensor {name!r}") from None

    def _row_range(self, name: str, start: int, stop: int | None) -> tuple[int, int]:
        rows = self._shape(name)[0]
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise InputError(f"rows [{start}, {stop}) of {name} do not exist; it has {rows} rows")
        return start, stop


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Check that ``tensor`` has neither NaN nor infinity.

    Raises:
        InputError: with the tensor's name and the number of such values.
    """
    # Unless it overflows, the sum is finite if all elements are: one pass without a mask.
    if math.isfinite(float(tensor.sum(dtype=torch.float64))):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InputError(
            f"weight {name} has {bad} values that are NaN or infinite; the checkpoint is damaged; "
            "get it again"
        )


# Random weights

BLOCK_ELEMENTS = 2**20  # drawn at once; changing it changes the weights of a seed
NORM_STD = 0.1  # far enough from zero to expose multiplying by w instead of 1 + w


class RandomSource(WeightSource):
    """Normally distributed float32 weights that need neither files nor memory.

    Each block is a function of seed, tensor name and row alone. For tests, timings and dry runs.

    Raises:
        InputError: the seed is negative or too large.
    """

    def __init__(self, config: Gemma3Config, seed: int) -> None:
        check_integer("the seed of random weights", seed, 0, MAX_SEED)
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
        """See :meth:`WeightSource.fingerprint`; the location is the seed."""
        return {"kind": "random", "location": f"seed {self._seed}", "files": {}}

    def _block(self, name: str, index: int, rows: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self._seed}:{name}:{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        shape = self._shape(name)
        std = NORM_STD if len(shape) == 1 else self.config.initializer_range
        return torch.randn((rows, *shape[1:]), generator=generator).mul_(std)
