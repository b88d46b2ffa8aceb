"""The few logits that sampling needs, chosen where the logits are.

A quarter of a million logits a token are a megabyte; greedy and top-k sampling look at a handful.
What the sampler makes of candidates is what it would make of all logits, or they are not offered:
:func:`candidates_from_top_k` returns None when it cannot be sure.

Shapes: V vocabulary, k fetched, C candidates.
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
    "candidates_from_top_k",
    "candidates_needed",
    "candidates_per_row",
]

TOP_K_LIMIT = 256  # beyond, all logits are fetched
SPARE_CANDIDATES = (
    32  # candidates fetched beyond those needed, since all equals of the last one count
)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The largest logits of one position, complete down to ``scores.min()``."""

    ids: NDArray[np.int64]  # [C] ascending
    scores: NDArray[np.float32]  # [C] their logits


@runtime_checkable
class SelectsCandidates(Protocol):
    """A runtime that can choose candidates where the logits are."""

    @property
    def selects_candidates(self) -> bool:
        """Whether it ever does, as it is."""

    def step_candidates(
        self, input_ids: IntArray, cache: KVCache, requests: Sequence[SamplingParams]
    ) -> Sequence[Logits | Candidates] | None:
        """As ``step`` with one token a row and one logit kept, but only what decides is fetched.

        Args:
            input_ids: [B, 1].
            cache: every row advances by one token.
            requests: how the rows that matter pick their tokens.

        Returns:
            One entry a row: candidates, or all logits [V] where these do not suffice. None, and
            nothing has happened, when all logits are needed or nothing is gained here.
        """


def candidates_needed(params: SamplingParams) -> int | None:
    """How many of the largest logits decide; None when all of them do."""
    if params.logprobs is not None or params.repetition_penalty != 1.0:
        return None
    if params.is_greedy:
        return 1
    return params.top_k if params.top_k and params.top_k <= TOP_K_LIMIT else None


def batch_candidates_needed(requests: Sequence[SamplingParams], vocab_size: int) -> int | None:
    """:func:`candidates_needed` by a batch; None also when few are left beyond them."""
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
    """Candidates out of the k largest logits of a position.

    Args:
        values: [k] in descending order.
        ids: [k] their tokens.
        total: the sum of all logits, which tells whether all of them are finite.
        needed: how many have to be complete, equals of the last one included.

    Returns:
        None where all logits have to be looked at: some are not finite, or so many equal the last
        one needed that more of them may have been left out.
    """
    if not np.isfinite(total) or values[-1] == values[needed - 1]:
        return None
    order = np.argsort(ids)
    return Candidates(ids[order].astype(np.int64), values[order])


def candidates_per_row(
    packed: Logits, fetched: int, needed: int, fetch: Callable[[], Logits]
) -> list[Candidates | Logits]:
    """What each row's next token is chosen from: the largest logits, or all [V] of them.

    Args:
        packed: [B, 2k + 1] values, largest first, their ids, and the sum of all logits.
        fetched: k.
        needed: how many of them have to be complete.
        fetch: brings all logits [B, V] from the device, for rows that they have to decide.
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
