"""A dry run of the cases: which logits they will look at, and how many steps they take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.parity.cases import SHORT, Case
from gemma3_export.parity.observations import Observation
from gemma3_export.parity.sequences import TokenSequence
from gemma3_export.runtimes.protocol import IntArray, KVCache, LayerKV, Logits

__all__ = ["PlanningRuntime", "needed_positions"]


class PlanningCache:
    """Counts tokens and holds none."""

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.lengths: IntArray = np.zeros(batch_size, np.int64)

    def read(self, row: int) -> list[LayerKV]:
        """Nothing."""
        del row
        return []

    def truncate(self, row: int, length: int) -> None:
        """Nothing."""
        del row, length


class PlanningRuntime:
    """A :class:`gemma3_export.runtimes.protocol.Runtime` that computes nothing."""

    name = "planning"

    def __init__(self, config: Gemma3Config) -> None:
        self.config = config

    def describe(self) -> dict[str, object]:
        """Its name."""
        return {"runtime": self.name}

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache that holds nothing."""
        return PlanningCache(batch_size, capacity)

    def step(
        self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int | None = None
    ) -> Logits:
        """Logits of an empty vocabulary."""
        del cache, row
        rows, new = input_ids.shape
        return np.zeros((rows, num_logits or new, 0), np.float32)


def needed_positions(
    config: Gemma3Config, cases: Sequence[Case], sequences: Sequence[TokenSequence]
) -> dict[int, set[int]]:
    """The positions of each sequence whose logits some case compares."""
    runtime = PlanningRuntime(config)
    needed: dict[int, set[int]] = {}
    for case in cases:
        if case.name == "padded":  # goes below the protocol, and compares all of two sequences
            needed |= {index: set(range(len(sequences[index].ids))) for index in SHORT}
            continue
        for seen in case.run(runtime):
            if isinstance(seen, Observation):
                needed.setdefault(seen.sequence, set()).update(seen.positions.tolist())
    return needed
