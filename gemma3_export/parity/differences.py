"""Measure how far a runtime's results are from the expected ones, position by position.

Shapes: P compared positions, V vocabulary, K key-value heads, S tokens, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "FloatArray",
    "LogitComparison",
    "LogitDifference",
    "TensorDifference",
    "compare_logits",
    "compare_tensors",
    "vocabulary_blocks",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
BLOCK_ELEMENTS = 2**20  # logits per block: a temporary takes 8 MB


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """Differences of the logits at P positions. NaN and infinity count as infinitely far off."""

    max_abs: FloatArray  # [P] over the vocabulary
    mean_square: FloatArray  # [P] over the vocabulary
    kld: FloatArray  # [P] KL(expected || actual), nats
    scale: FloatArray  # [P] largest absolute expected logit
    margin: FloatArray  # [P] best minus second-best expected logit
    is_same_top1: BoolArray  # [P]
    nll_expected: FloatArray  # [P] negative log-likelihood of the next token; NaN at the end
    nll: FloatArray  # [P] the same from the actual logits

    @classmethod
    def join(cls, parts: Sequence[LogitDifference]) -> LogitDifference:
        """Concatenate the positions of several differences."""
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(cls)
            }
        )

    def at(self, index: int) -> LogitDifference:
        """Return the difference at one of the P positions."""
        part = slice(index, index + 1)
        return LogitDifference(
            **{field.name: getattr(self, field.name)[part] for field in fields(self)}
        )


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """Differences of one tensor along its S positions."""

    max_abs: FloatArray  # [S]
    mean_square: FloatArray  # [S]
    scale: float  # largest absolute expected element


def compare_logits(expected: Tensor, actual: Tensor, next_ids: Sequence[int]) -> LogitDifference:
    """Compare logits [P, V].

    Args:
        expected: [P, V] floating point.
        actual: [P, V] floating point.
        next_ids: [P] the token that follows each position, or -1 at the end of the sequence.
    """
    comparison = LogitComparison(next_ids)
    for ids in vocabulary_blocks(*expected.shape):
        comparison.add(ids.start, expected[:, ids], actual[:, ids])
    return comparison.result()


def vocabulary_blocks(positions: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` vocabulary rows, so small that temporaries stay in the cache."""
    step = max(1, BLOCK_ELEMENTS // positions)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class LogitComparison:
    """Compare the logits of P positions, one block of the vocabulary after the other.

    Sums over exp(logit) are relative to the largest expected logit so far.

    Args:
        next_ids: [P] the token that follows each position, or -1 at the end of the sequence.
    """

    def __init__(self, next_ids: Sequence[int]) -> None:
        self.next_ids = torch.tensor(list(next_ids))
        zero = torch.zeros(len(self.next_ids), dtype=torch.float64)
        self.size = 0
        self.max_abs, self.square, self.scale = zero.clone(), zero.clone(), zero.clone()
        self.mass, self.growth, self.excess = zero.clone(), zero.clone(), zero.clone()
        self.next_expected, self.next_delta = zero.clone(), zero.clone()
        self.top2 = torch.full((len(zero), 2), -torch.inf, dtype=torch.float64)
        self.best, self.actual_best = self.top2[:, 0], self.top2[:, 0]
        self.best_id, self.actual_best_id = torch.zeros(2, len(zero), dtype=torch.int64)

    def add(self, first_id: int, expected: Tensor, actual: Tensor) -> None:
        """Add the logits [P, v] of consecutive tokens from ``first_id`` on."""
        expected, actual = expected.double(), actual.double()
        delta = actual - expected
        self.size += expected.shape[1]
        self.max_abs = torch.maximum(self.max_abs, delta.abs().amax(-1))
        self.square += delta.square().sum(-1)
        self.scale = torch.maximum(self.scale, expected.abs().amax(-1))
        before = self.best
        self.best, self.best_id = _better(expected, first_id, before, self.best_id)
        self.actual_best, self.actual_best_id = _better(
            actual, first_id, self.actual_best, self.actual_best_id
        )
        top2 = expected.topk(min(2, expected.shape[1]), dim=-1).values
        self.top2 = torch.cat((self.top2, top2), 1).topk(2, dim=-1).values
        fade = (before - self.best).exp()
        p, growth = (expected - self.best[:, None]).exp_(), torch.expm1(delta)
        self.mass = self.mass * fade + p.sum(-1)
        self.growth = self.growth * fade + (p * growth).sum(-1)
        self.excess = self.excess * fade + (p * (growth - delta)).sum(-1)
        is_here = (self.next_ids >= first_id) & (self.next_ids < first_id + expected.shape[1])
        index = (self.next_ids - first_id).clamp(0, expected.shape[1] - 1)[:, None]
        self.next_expected += expected.gather(1, index)[:, 0].where(is_here, 0.0)
        self.next_delta += delta.gather(1, index)[:, 0].where(is_here, 0.0)

    def result(self) -> LogitDifference:
        """Return the differences over everything that was added."""
        mean_growth = self.growth / self.mass
        # log(sum p e^d) - sum p d, arranged to avoid cancellation for tiny deltas.
        kld = (torch.log1p(mean_growth) - mean_growth) + self.excess / self.mass
        nll_expected = self.best + self.mass.log() - self.next_expected
        nll = nll_expected - self.next_delta + torch.log1p(mean_growth)
        is_end = self.next_ids < 0
        return LogitDifference(
            max_abs=finite(self.max_abs),
            mean_square=finite(self.square / self.size),
            # Rounding can make the divergence of equal distributions slightly negative.
            kld=finite(kld.clamp(min=0)),
            scale=self.scale.numpy(),
            margin=(self.top2[:, 0] - self.top2[:, 1]).numpy(),
            is_same_top1=(self.actual_best_id == self.best_id).numpy(),
            nll_expected=nll_expected.masked_fill(is_end, torch.nan).numpy(),
            nll=nll.masked_fill(is_end, torch.nan).numpy(),
        )


def _better(block: Tensor, first_id: int, best: Tensor, best_id: Tensor) -> tuple[Tensor, Tensor]:
    """Return the larger of the best logit so far and that of ``block``, and its token id."""
    value, index = block.max(-1)
    is_better = (value > best) | value.isnan()
    return value.where(is_better, best), (index + first_id).where(is_better, best_id)


def compare_tensors(expected: Tensor, actual: Tensor) -> TensorDifference:
    """Compare two tensors [S, ...] of the same shape."""
    expected, actual = expected.flatten(1).double(), actual.flatten(1).double()
    delta = actual - expected
    return TensorDifference(
        max_abs=finite(delta.abs().amax(1)),
        mean_square=finite(delta.square().mean(1)),
        scale=float(expected.abs().max()),
    )


def finite(distance: Tensor) -> FloatArray:
    """Return distances with NaN replaced by infinity."""
    return torch.nan_to_num(distance, nan=torch.inf, posinf=torch.inf).numpy()
