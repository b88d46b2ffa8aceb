"""Measure how far a runtime's results are from the expected ones, position by position.

Shapes: P compared positions, V vocabulary, K key-value heads, S tokens, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "BLOCK",
    "FloatArray",
    "LogitDifference",
    "TensorDifference",
    "compare_logits",
    "compare_tensors",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
BLOCK = 32  # positions per block: a temporary takes 64 MB for the official vocabulary


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
    parts = [
        _compare_block(
            expected[start : start + BLOCK].double(),
            actual[start : start + BLOCK].double(),
            next_ids[start:],
        )
        for start in range(0, expected.shape[0], BLOCK)
    ]
    return LogitDifference.join(parts)


def _compare_block(expected: Tensor, actual: Tensor, next_ids: Sequence[int]) -> LogitDifference:
    delta = actual - expected
    p = expected.softmax(-1)
    growth = torch.expm1(delta)
    mean_growth = (p * growth).sum(-1)
    # log(sum p e^d) - sum p d, arranged to avoid cancellation for tiny deltas.
    kld = (torch.log1p(mean_growth) - mean_growth) + (p * growth.sub_(delta)).sum(-1)
    best = expected.topk(2, dim=-1)
    ids = torch.tensor(list(next_ids[: expected.shape[0]]))[:, None]
    index = ids.clamp(min=0)
    nll_expected = -p.gather(1, index).log()
    nll = nll_expected - delta.gather(1, index) + torch.log1p(mean_growth)[:, None]
    is_end = ids < 0
    nan = float("nan")
    return LogitDifference(
        max_abs=finite(delta.abs().amax(-1)),
        mean_square=finite(delta.square().mean(-1)),
        # Rounding can make the divergence of equal distributions slightly negative.
        kld=finite(kld.clamp(min=0)),
        scale=expected.abs().amax(-1).numpy(),
        margin=(best.values[:, 0] - best.values[:, 1]).numpy(),
        is_same_top1=(actual.argmax(-1) == best.indices[:, 0]).numpy(),
        nll_expected=nll_expected.masked_fill(is_end, nan)[:, 0].numpy(),
        nll=nll.masked_fill(is_end, nan)[:, 0].numpy(),
    )


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
