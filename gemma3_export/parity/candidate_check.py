"""Check the candidate tokens that a backend selects against all logits that it would return.

Greedy and top-k sampling may never see the logits that were not selected, so no other case detects
a wrong selection. Here every step runs twice, on separate caches: with all logits, and with
candidates.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.runtimes.generation.candidates import (
    SPARE_CANDIDATES,
    Candidates,
    SelectsCandidates,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVCache,
    LayerKV,
    Logits,
    Runtime,
    RuntimeInfo,
)

__all__ = ["CandidateLogits", "with_candidates"]

TOP_KS = (1, 40)  # used in turn


def with_candidates(runtime: Runtime) -> Runtime | None:
    """Return ``runtime`` with candidates in place of logits, or None if it never selects any."""
    if isinstance(runtime, SelectsCandidates) and runtime.selects_candidates:
        return CandidateLogits(runtime)
    return None


@dataclass(frozen=True, slots=True)
class TwinCaches:
    """The caches of both ways to run a step; a :class:`KVCache`."""

    plain: KVCache
    selecting: KVCache

    @property
    def batch_size(self) -> int:
        """Return the number of rows."""
        return self.selecting.batch_size

    @property
    def capacity(self) -> int:
        """Return the number of tokens that each row can hold."""
        return self.selecting.capacity

    @property
    def lengths(self) -> IntArray:
        """Return the number of tokens [B] that each row holds."""
        return self.selecting.lengths

    def read(self, row: int) -> list[LayerKV]:
        """See :class:`KVCache`."""
        return self.selecting.read(row)

    def truncate(self, row: int, length: int) -> None:
        """See :class:`KVCache`."""
        self.plain.truncate(row, length)
        self.selecting.truncate(row, length)

    def swap(self, row: int, other: int) -> None:
        """See :class:`KVCache`."""
        self.plain.swap(row, other)
        self.selecting.swap(row, other)


class CandidateLogits:
    """A :class:`Runtime` that returns the scores of selected candidates as logits.

    The other logits are the backend's own, but clipped to the smallest candidate, because that is
    how the sampler treats them. A token that was wrongly omitted shows up as an error of that size.
    """

    def __init__(self, runtime: Runtime) -> None:
        assert isinstance(runtime, SelectsCandidates)
        self.runtime: Runtime = runtime
        self.selector: SelectsCandidates = runtime
        self.config: Gemma3Config = runtime.config
        self.steps = 0

    @property
    def info(self) -> RuntimeInfo:
        """See :class:`Runtime`."""
        return self.runtime.info

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See :class:`Runtime`."""
        caches = (self.runtime.new_cache(batch_size, capacity) for _ in range(2))
        return TwinCaches(*caches)

    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """See :class:`Runtime`."""
        assert isinstance(cache, TwinCaches)
        logits = self.runtime.step(input_ids, cache.plain, num_logits=num_logits, row=row)
        selected = None
        if input_ids.shape == (cache.batch_size, 1):
            requests = [SamplingParams(top_k=self._top_k())] * len(input_ids)
            selected = self.selector.step_candidates(input_ids, cache.selecting, requests)
        if selected is None:
            self.runtime.step(input_ids, cache.selecting, num_logits=1, row=row)
            return logits
        rows = [overlay(*pair) for pair in zip(logits[:, -1], selected, strict=True)]
        result: Logits = np.stack(rows)[:, None]
        return result

    def _top_k(self) -> int:
        self.steps += 1
        limit = max(1, self.config.vocab_size - SPARE_CANDIDATES - 1)
        return min(TOP_KS[self.steps % len(TOP_KS)], limit)


def overlay(logits: Logits, selected: Logits | Candidates) -> Logits:
    """Return the logits [V] that a sampler would assume."""
    if not isinstance(selected, Candidates):
        return selected
    result: Logits = np.minimum(logits, selected.scores.min())
    result[selected.ids] = selected.scores
    return result
