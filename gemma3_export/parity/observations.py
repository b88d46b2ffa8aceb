"""What a case sees of a runtime: logits at known places, and caches.

Shapes: P compared positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.parity.sequences import TokenSequence
from gemma3_export.runtimes.protocol import IntArray, LayerKV, Logits, Runtime

__all__ = ["CacheRead", "Observation", "Seen", "TeacherForcing", "least_tokens"]


@dataclass(frozen=True, slots=True)
class Observation:
    """Logits [P, V] that a step gave for consecutive positions of one sequence."""

    sequence: int
    positions: IntArray  # [P] index of the token whose successor the logits predict
    logits: Logits
    step: int  # of the case, from 0
    first_new: int  # position of the step's first token: what was cached before it


@dataclass(frozen=True, slots=True)
class CacheRead:
    """One row's cache after ``length`` tokens of a sequence."""

    sequence: int
    length: int
    layers: list[LayerKV]
    least: list[int]  # tokens that each layer has to hold still


Seen = Observation | CacheRead


class TeacherForcing:
    """Feeds sequences to the rows of one cache, whatever the runtime would have said."""

    def __init__(
        self, runtime: Runtime, sequences: Sequence[TokenSequence], rows: Sequence[int]
    ) -> None:
        self.runtime = runtime
        self.sequences = sequences
        self.rows = list(rows)
        self.fed = [0] * len(self.rows)
        self.steps = 0
        capacity = max(len(sequences[row].ids) for row in rows)
        self.cache = runtime.new_cache(len(self.rows), capacity)

    def step(self, count: int, *, keep: int = 0, row: int | None = None) -> list[Observation]:
        """Feed the next ``count`` tokens of one row, or of all; keep the last ``keep`` logits."""
        rows = range(len(self.rows)) if row is None else [row]
        ids = [self.sequences[self.rows[r]].ids[self.fed[r] : self.fed[r] + count] for r in rows]
        logits = self.runtime.step(
            np.ascontiguousarray(np.stack(ids)), self.cache, num_logits=keep, row=row
        )
        seen = []
        for index, r in enumerate(rows):
            start = self.fed[r]
            self.fed[r] += count
            positions = np.arange(self.fed[r] - (keep or count), self.fed[r])
            seen.append(
                Observation(self.rows[r], positions, logits[index], self.steps, first_new=start)
            )
        self.steps += 1
        return seen

    def read(self) -> list[CacheRead]:
        """Every row's cache."""
        return [
            CacheRead(
                sequence,
                self.fed[row],
                self.cache.read(row),
                least_tokens(self.runtime.config, self.fed[row]),
            )
            for row, sequence in enumerate(self.rows)
        ]


def least_tokens(config: Gemma3Config, length: int) -> list[int]:
    """What each layer's cache must hold of ``length`` tokens: all, or what the next can see."""
    window = config.sliding_window - 1  # the next token is in its own window
    return [
        min(length, window) if config.is_sliding(layer) else length
        for layer in range(config.num_hidden_layers)
    ]
