"""Candidates: the few logits that decide the next token, selected on the device.

The logits of one token are 1 MB; greedy and top-k sampling look at a handful of them. Candidates
are used only if the sampler is sure to choose the same token as from all logits:
:func:`candidates_from_top_k` returns None if it is not.

Shapes: R rows, V vocabulary, k fetched, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import IntArray, KVCache, Logits

__all__ = [
    "SPARE_CANDIDATES",
    "Candidates",
    "SelectsCandidates",
    "batch_candidates_needed",
    "best_per_row",
    "candidates_from_top_k",
    "candidates_needed",
    "candidates_per_row",
]

TOP_K_LIMIT = 256  # above, all logits are fetched
SPARE_CANDIDATES = 32  # fetched beyond those needed, because ties with the last one count


@dataclass(frozen=True, slots=True)
class Candidates:
    """The largest logits of one position: none above ``scores.min()`` is missing."""

    ids: NDArray[np.int64]  # [C] ascending
    scores: NDArray[np.float32]  # [C] their logits


@runtime_checkable
class SelectsCandidates(Protocol):
    """A runtime that can select candidates on the device instead of returning all logits."""

    @property
    def selects_candidates(self) -> bool:
        """Return True if this runtime, as loaded, ever selects candidates itself."""

    def step_candidates(
        self,
        input_ids: IntArray,
        cache: KVCache,
        requests: Sequence[SamplingParams],
        *,
        row: int = 0,
    ) -> Sequence[Logits | Candidates] | None:
        """Run a single-token step that fetches only the logits that decide the next tokens.

        Args:
            input_ids: [R, 1].
            cache: the R rows from ``row`` on advance by one token.
            requests: sampling parameters of these rows.
            row: the first of them.

        Returns:
            One entry per row: candidates, or all logits [V] if candidates do not suffice. None if
            all logits are needed or candidates would save nothing; no step has then been taken.
        """


def candidates_needed(params: SamplingParams) -> int | None:
    """Return how many of the largest logits decide; None if all of them do."""
    if params.logprobs is not None or params.changes_logits:
        return None
    if params.is_greedy:
        return 1
    return params.top_k if params.top_k and params.top_k <= TOP_K_LIMIT else None


def batch_candidates_needed(requests: Sequence[SamplingParams], vocab_size: int) -> int | None:
    """Return :func:`candidates_needed` for a batch; None also if nearly all logits are needed."""
    most = 0
    for params in requests:
        count = candidates_needed(params)
        if count is None:
            return None
        most = max(most, count)
    return most if most + SPARE_CANDIDATES < vocab_size else None


def candidates_from_top_k(
    values: NDArray[np.float32], ids: NDArray[Any], total: float, needed: int
) -> Candidates | None:
    """Return candidates from the k largest logits of a position.

    Args:
        values: [k] in descending order.
        ids: [k] their tokens.
        total: the sum of all logits, which is finite only if all of them are.
        needed: how many have to be complete, including ties with the last of them.

    Returns:
        None if all logits are needed: some are not finite, or so many tie with the last one needed
        that others may be missing.
    """
    if not np.isfinite(total) or values[-1] == values[needed - 1]:
        return None
    order = np.argsort(ids)
    return Candidates(ids[order].astype(np.int64), values[order])


def candidates_per_row(
    packed: Logits, fetched: int, needed: int, fetch: Callable[[], Logits]
) -> list[Candidates | Logits]:
    """Return what decides each row's next token: candidates, or all logits [V].

    Args:
        packed: [R, 2k + 1] values, largest first, their ids, and the sum of all logits.
        fetched: k.
        needed: how many of them have to be complete.
        fetch: fetches all logits [R, V] from the device, for rows that need them.
    """
    found: list[Candidates | Logits] = []
    everything: Logits | None = None
    for index, row in enumerate(packed):
        values, ids, total = row[:fetched], row[fetched:-1], float(row[-1])
        chosen = candidates_from_top_k(values, ids, total, needed)
        if chosen is None:
            everything = fetch() if everything is None else everything
            found.append(everything[index])
        else:
            found.append(chosen)
    return found


def best_per_row(packed: Logits, fetch: Callable[[], Logits]) -> list[Candidates | Logits]:
    """Return each row's largest logit, or all logits [V] if some of the row are not finite.

    Args:
        packed: [R, 3] the largest logit, its id (the first of equals), and the sum of all logits.
        fetch: fetches all logits [R, V] from the device, for rows that need them.
    """
    are_finite = np.isfinite(packed[:, 2])
    everything = None if are_finite.all() else fetch()
    return [
        Candidates(row[1:2].astype(np.int64), row[:1].copy())
        if is_finite or everything is None
        else everything[index]
        for index, (row, is_finite) in enumerate(zip(packed, are_finite, strict=True))
    ]
