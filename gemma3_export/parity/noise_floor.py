"""Measure the noise floor: the error that the reference's own rounding causes.

No tolerance is set by hand. The expected values come from the reference in float64; the noise floor
is the error of the same reference in the runtime's precision, on the same tokens, in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from gemma3_export.parity.differences import (
    BLOCK,
    FloatArray,
    LogitDifference,
    TensorDifference,
    compare_logits,
    compare_tensors,
)
from gemma3_export.parity.expected import ExpectedValues
from gemma3_export.parity.rounding import ROUNDING_SHARE
from gemma3_export.parity.sequences import TokenSequence
from gemma3_export.reference.model import KeyValue
from gemma3_export.runtimes.protocol import IntArray

__all__ = ["NoiseFloor", "next_ids"]

KeyValueDifference = tuple[TensorDifference, TensorDifference]


class NoiseFloor:
    """Errors of a rounded reference, computed once per position.

    Args:
        expected: the values of the exact reference.
        rounded: the values of the reference in the runtime's precision.
        sequences: the sequences that both have processed.
        unquantized: the values of the rounded reference with float activations, if the other two
            round activations to int8; see :mod:`gemma3_export.parity.rounding`.
    """

    def __init__(
        self,
        expected: ExpectedValues,
        rounded: ExpectedValues,
        sequences: Sequence[TokenSequence],
        unquantized: ExpectedValues | None = None,
    ) -> None:
        self.expected, self.rounded, self.unquantized = expected, rounded, unquantized
        self.sequences = sequences
        self._logits: dict[tuple[int, int], LogitDifference] = {}
        self._caches: dict[int, list[KeyValueDifference]] = {}

    def logits(self, sequence: int, positions: IntArray) -> LogitDifference:
        """Return the errors of the logits at ``positions`` [P]."""
        new = [int(p) for p in positions if (sequence, int(p)) not in self._logits]
        for start in range(0, len(new), BLOCK):
            block = np.array(new[start : start + BLOCK])
            difference = self._compare_logits(sequence, block)
            for index, position in enumerate(block.tolist()):
                self._logits[sequence, position] = difference.at(index)
        return LogitDifference.join([self._logits[sequence, int(p)] for p in positions])

    def caches(self, sequence: int) -> list[KeyValueDifference]:
        """Return the errors of (key, value) per layer, along the whole sequence."""
        if sequence not in self._caches:
            expected = self.expected.key_values(sequence)
            errors = compare_caches(expected, self.rounded.key_values(sequence))
            if self.unquantized is not None:
                costs = compare_caches(expected, self.unquantized.key_values(sequence))
                errors = [
                    (with_rounding_share(key, key_cost), with_rounding_share(value, value_cost))
                    for (key, value), (key_cost, value_cost) in zip(errors, costs, strict=True)
                ]
            self._caches[sequence] = errors
        return self._caches[sequence]

    def _compare_logits(self, sequence: int, positions: IntArray) -> LogitDifference:
        expected = self.expected.logits(sequence, positions)
        following = next_ids(self.sequences[sequence], positions)
        error = compare_logits(expected, self.rounded.logits(sequence, positions), following)
        if self.unquantized is None:
            return error
        cost = compare_logits(expected, self.unquantized.logits(sequence, positions), following)
        return replace(with_rounding_share(error, cost), kld=add_squares(error.kld, cost.kld))


Difference = TypeVar("Difference", LogitDifference, TensorDifference)


def with_rounding_share(error: Difference, cost: Difference) -> Difference:
    """Return a noise floor that includes a share of ``cost``, what activation rounding costs."""
    return replace(
        error,
        max_abs=error.max_abs + ROUNDING_SHARE * cost.max_abs,
        mean_square=add_squares(error.mean_square, cost.mean_square),
    )


def add_squares(error: FloatArray, cost: FloatArray) -> FloatArray:
    """Add the share to a quantity that is quadratic in the error."""
    total: FloatArray = (np.sqrt(error) + ROUNDING_SHARE * np.sqrt(cost)) ** 2
    return total


def compare_caches(
    expected: Sequence[KeyValue], actual: Sequence[KeyValue]
) -> list[KeyValueDifference]:
    """Return the (key, value) differences per layer; inputs are [K, S, H]."""
    return [
        (
            compare_tensors(wanted[0].transpose(0, 1), found[0].transpose(0, 1)),
            compare_tensors(wanted[1].transpose(0, 1), found[1].transpose(0, 1)),
        )
        for wanted, found in zip(expected, actual, strict=True)
    ]


def next_ids(sequence: TokenSequence, positions: IntArray) -> list[int]:
    """Return the token that follows each position, or -1 at the end."""
    return [
        int(sequence.ids[p + 1]) if p + 1 < len(sequence.ids) else -1 for p in positions.tolist()
    ]
