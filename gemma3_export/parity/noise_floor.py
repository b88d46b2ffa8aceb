"""Measure the noise floor: the error that the reference's own rounding causes.

No tolerance is set by hand. The expected values come from the reference in float64; the noise floor
is the error of the same reference in the runtime's precision, on the same tokens, in the same run.

Some positions amplify any rounding, such as a norm of a small vector, and along one direction. The
ratio of two correct errors there is that of two random numbers, which exceeds 8 in one of twelve
cases. In float32, the noise floor is therefore the larger of two samples, the second of which
starts from other roundings of the embeddings. Half precision rounds at every step, and rounded
activations have a share of their own, so their errors are sums of many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from gemma3_export.parity.differences import (
    FloatArray,
    LogitDifference,
    TensorDifference,
    compare_tensors,
)
from gemma3_export.parity.rounding import ROUNDING_SHARE
from gemma3_export.parity.sequences import TokenSequence
from gemma3_export.parity.stored_logits import PositionKey
from gemma3_export.reference.model import KeyValue
from gemma3_export.runtimes.protocol import IntArray

__all__ = ["NoiseFloor", "compare_key_values", "larger", "next_ids", "with_rounding_share"]

KeyValueDifference = tuple[TensorDifference, TensorDifference]


@dataclass(kw_only=True, slots=True)
class NoiseFloor:
    """Errors of a rounded reference, by position."""

    sequences: Sequence[TokenSequence]
    compute: Callable[[Sequence[PositionKey]], None]  # measures the logits of these positions
    by_position: dict[PositionKey, LogitDifference] = field(default_factory=dict)
    by_sequence: list[list[KeyValueDifference]] = field(default_factory=list)  # (key, value)

    def logits(self, sequence: int, positions: IntArray) -> LogitDifference:
        """Return the errors of the logits at ``positions`` [P]."""
        keys = [(sequence, position) for position in positions.tolist()]
        self.compute(keys)
        return LogitDifference.join([self.by_position[key] for key in keys])

    def caches(self, sequence: int) -> list[KeyValueDifference]:
        """Return the errors of (key, value) per layer, along the whole sequence."""
        return self.by_sequence[sequence]


Difference = TypeVar("Difference", LogitDifference, TensorDifference)


def larger(one: Difference, other: Difference) -> Difference:
    """Return the larger errors of two samples of a noise floor."""
    widened = replace(
        one,
        max_abs=np.maximum(one.max_abs, other.max_abs),
        mean_square=np.maximum(one.mean_square, other.mean_square),
    )
    if isinstance(widened, LogitDifference) and isinstance(other, LogitDifference):
        return replace(widened, kld=np.maximum(widened.kld, other.kld))
    return widened


def with_rounding_share(error: Difference, cost: Difference) -> Difference:
    """Return a noise floor that includes a share of ``cost``, what activation rounding costs."""
    widened = replace(
        error,
        max_abs=error.max_abs + ROUNDING_SHARE * cost.max_abs,
        mean_square=add_squares(error.mean_square, cost.mean_square),
    )
    if isinstance(widened, LogitDifference) and isinstance(cost, LogitDifference):
        return replace(widened, kld=add_squares(widened.kld, cost.kld))
    return widened


def add_squares(error: FloatArray, cost: FloatArray) -> FloatArray:
    """Add the share to a quantity that is quadratic in the error."""
    total: FloatArray = (np.sqrt(error) + ROUNDING_SHARE * np.sqrt(cost)) ** 2
    return total


def compare_key_values(expected: KeyValue, actual: KeyValue) -> KeyValueDifference:
    """Return the differences of one layer's keys and values [K, S, H]."""
    key, value = (
        compare_tensors(wanted.transpose(0, 1), found.transpose(0, 1))
        for wanted, found in zip(expected, actual, strict=True)
    )
    return key, value


def next_ids(sequence: TokenSequence, positions: IntArray) -> list[int]:
    """Return the token that follows each position, or -1 at the end."""
    return [
        int(sequence.ids[p + 1]) if p + 1 < len(sequence.ids) else -1 for p in positions.tolist()
    ]
