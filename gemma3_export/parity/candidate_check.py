"""Candidates that a backend chooses, beside all logits that it would give.

Greedy and top-k sampling may never see the logits that were not chosen, so a wrong choice shows in
no other case. Here every step is taken twice, with all logits and with candidates, on a cache each.

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

__all__ = ["ChosenLogits", "chosen_logits"]

TOP_KS = (1, 40)  # in turns


def chosen_logits(runtime: Runtime) -> Runtime | None:
    """``runtime`` with its choice in place of logits; None where it never chooses."""
    if isinstance(runtime, SelectsCandidates) and runtime.selects_candidates:
        return ChosenLogits(runtime)
    return None


@dataclass(frozen=True, slots=True)
class TwinCaches:
    """The caches of both ways to take a step."""

    plain: KVCache
    choosing: KVCache

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.choosing.batch_size

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""
        return self.choosing.capacity

    @property
    def lengths(self) -> IntArray:
        """[B] tokens that each row holds."""
        return self.choosing.lengths

    def read(self, row: int) -> list[LayerKV]:
        """See :class:`KVCache`."""
        return self.choosing.read(row)

    def truncate(self, row: int, length: int) -> None:
        """See :class:`KVCache`."""
        self.plain.truncate(row, length)
        self.choosing.truncate(row, length)


class ChosenLogits:
    """A :class:`Runtime` whose logits, where candidates were chosen, are these.

    Every logit that was not chosen is as the backend computes it, but no larger than the smallest
    candidate, since that is what the sampler takes it for: one that was left out wrongly is an
    error of that size.
    """

    def __init__(self, runtime: Runtime) -> None:
        assert isinstance(runtime, SelectsCandidates)
        self.runtime: Runtime = runtime
        self.chooser: SelectsCandidates = runtime
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

    def step(
        self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int | None = None
    ) -> Logits:
        """See :class:`Runtime`."""
        assert isinstance(cache, TwinCaches)
        logits = self.runtime.step(input_ids, cache.plain, num_logits=num_logits, row=row)
        chosen = None
        if row is None and input_ids.shape[1] == 1:
            requests = [SamplingParams(top_k=self._top_k())] * len(input_ids)
            chosen = self.chooser.step_candidates(input_ids, cache.choosing, requests)
        if chosen is None:
            self.runtime.step(input_ids, cache.choosing, num_logits=1, row=row)
            return logits
        rows = [overlaid(*pair) for pair in zip(logits[:, -1], chosen, strict=True)]
        seen: Logits = np.stack(rows)[:, None]
        return seen

    def _top_k(self) -> int:
        self.steps += 1
        return min(
            TOP_KS[self.steps % len(TOP_KS)], max(1, self.config.vocab_size - SPARE_CANDIDATES - 1)
        )


def overlaid(logits: Logits, chosen: Logits | Candidates) -> Logits:
    """[V] what a sampler may take the logits for."""
    if not isinstance(chosen, Candidates):
        return chosen
    seen: Logits = np.minimum(logits, chosen.scores.min())
    seen[chosen.ids] = chosen.scores
    return seen
