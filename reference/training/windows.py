"""Random windows of text, each batch a function of seed and position alone.

The draws are counter-based, so the position in the data is one number: nothing has to be replayed
after an interruption, and several processes take their rows of the same global batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma3_export.errors import InputError

__all__ = ["TRAIN_STREAM", "VALIDATION_STREAM", "Windows"]

TRAIN_STREAM, VALIDATION_STREAM = 0, 1  # evaluation draws from a stream of its own


class Windows:
    """Batches of ``context_length`` tokens and the tokens that follow them.

    Raises:
        InputError: there are fewer tokens than one batch needs.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger[Any]],
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        stream: int,
    ) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.batch_size = batch_size
        self._key = seed + (stream << 64)
        needed = context_length + 1
        if stream == TRAIN_STREAM:
            needed = batch_size * context_length + 1
        if tokens.size < needed:
            raise InputError(
                f"the {'training' if stream == TRAIN_STREAM else 'validation'} text has "
                f"{tokens.size} tokens, but {needed} are needed for {batch_size} windows of "
                f"{context_length} tokens; give more text, or lower --batch-size or "
                "--context-length"
            )

    def batch(self, index: int, *, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each [B, T] int64: the rank's rows of global batch ``index``."""
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=index << 128))
        last = self.tokens.size - self.context_length
        starts = generator.integers(0, last, size=self.batch_size * world_size)
        mine = starts[rank * self.batch_size : (rank + 1) * self.batch_size]
        rows = np.stack([self.tokens[start : start + self.context_length + 1] for start in mine])
        windows = torch.from_numpy(rows.astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
