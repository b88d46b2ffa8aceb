"""Distances between what a runtime computed and what it should have, position by position.

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
BLOCK = 32  # positions at once: 64 MB a temporary for the official vocabulary


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """Distances at P positions; an infinite or missing number counts as an infinite distance."""

    max_abs: FloatArray  # [P] over the vocabulary
    mean_square: FloatArray  # [P] over the vocabulary
    kld: FloatArray  # [P] nats, of the runtime from the truth
    scale: FloatArray  # [P] largest true logit, absolute
    margin: FloatArray  # [P] truth's best minus its second best logit
    is_same_top1: BoolArray  # [P]
    nll_truth: FloatArray  # [P] of the sequence's next token; NaN at its end
    nll: FloatArray  # [P] the same from the runtime's logits

    @classmethod
    def join(cls, parts: Sequence[LogitDifference]) -> LogitDifference:
        """One after another."""
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(cls)
            }
        )


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """Distances of one tensor along its S positions."""

    max_abs: FloatArray  # [S]
    mean_square: FloatArray  # [S]
    scale: float  # largest true element, absolute


def compare_logits(truth: Tensor, found: Tensor, next_ids: Sequence[int]) -> LogitDifference:
    """Compare logits [P, V]; ``next_ids`` has -1 where the sequence ends."""
    parts = [
        _compare_block(
            truth[at : at + BLOCK].double(), found[at : at + BLOCK].double(), next_ids[at:]
        )
        for at in range(0, truth.shape[0], BLOCK)
    ]
    return LogitDifference.join(parts)


def _compare_block(truth: Tensor, found: Tensor, next_ids: Sequence[int]) -> LogitDifference:
    delta = found - truth
    p = truth.softmax(-1)
    growth = torch.expm1(delta)
    mean_growth = (p * growth).sum(-1)
    # log(sum p e^d) - sum p d, arranged so that nothing cancels when the delta is tiny.
    kld = (torch.log1p(mean_growth) - mean_growth) + (p * growth.sub_(delta)).sum(-1)
    best = truth.topk(2, dim=-1)
    ids = torch.tensor(list(next_ids[: truth.shape[0]]))[:, None]
    at = ids.clamp(min=0)
    nll_truth = -p.gather(1, at).log()
    nll = nll_truth - delta.gather(1, at) + torch.log1p(mean_growth)[:, None]
    is_end = ids < 0
    nan = float("nan")
    return LogitDifference(
        max_abs=finite(delta.abs().amax(-1)),
        mean_square=finite(delta.square().mean(-1)),
        # Rounding may leave the divergence of two equals a little below zero.
        kld=finite(kld.clamp(min=0)),
        scale=truth.abs().amax(-1).numpy(),
        margin=(best.values[:, 0] - best.values[:, 1]).numpy(),
        is_same_top1=(found.argmax(-1) == best.indices[:, 0]).numpy(),
        nll_truth=nll_truth.masked_fill(is_end, nan)[:, 0].numpy(),
        nll=nll.masked_fill(is_end, nan)[:, 0].numpy(),
    )


def compare_tensors(truth: Tensor, found: Tensor) -> TensorDifference:
    """Compare two tensors [S, ...] of the same shape."""
    truth, found = truth.flatten(1).double(), found.flatten(1).double()
    delta = found - truth
    return TensorDifference(
        max_abs=finite(delta.abs().amax(1)),
        mean_square=finite(delta.square().mean(1)),
        scale=float(truth.abs().max()),
    )


def finite(distance: Tensor) -> FloatArray:
    """NaN is as far away as infinity."""
    return torch.nan_to_num(distance, nan=torch.inf, posinf=torch.inf).numpy()
