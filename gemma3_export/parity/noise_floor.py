"""The yardstick: the truth, and how far the reference's own rounding strays from it.

Nobody sets a tolerance by hand. The truth is the reference in float64; the noise floor is the error
of the same reference in the runtime's precision, on the same tokens, in the same run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from gemma3_export.parity.differences import (
    BLOCK,
    FloatArray,
    LogitDifference,
    TensorDifference,
    compare_logits,
    compare_tensors,
)
from gemma3_export.parity.expected import ReferenceTruth, Truth, with_greedy_tokens
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.rounding import FLIP_SHARE, ActivationRounding, widen_residual
from gemma3_export.parity.sequences import TokenSequence, decode_start, sequences_for
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3, KeyValue
from gemma3_export.reference.weights import WeightSource
from gemma3_export.runtimes.protocol import IntArray
from gemma3_export.tokenizer import Tokenizer

__all__ = ["NoiseFloor", "Yardstick"]

KeyValueDifference = tuple[TensorDifference, TensorDifference]


class NoiseFloor:
    """Errors of a noisy truth against the truth, computed once for each place.

    Args:
        truth: the reference.
        noisy: the same in the runtime's precision.
        sequences: what both run on.
        smooth: the same without rounding of activations, when the other two round them; see
            :mod:`gemma3_export.parity.rounding`.
    """

    def __init__(
        self,
        truth: Truth,
        noisy: Truth,
        sequences: Sequence[TokenSequence],
        smooth: Truth | None = None,
    ) -> None:
        self.truth, self.noisy, self.smooth = truth, noisy, smooth
        self.sequences = sequences
        self._logits: dict[tuple[int, int], LogitDifference] = {}
        self._caches: dict[int, list[KeyValueDifference]] = {}

    def logits(self, sequence: int, positions: IntArray) -> LogitDifference:
        """At each of ``positions``."""
        new = [int(p) for p in positions if (sequence, int(p)) not in self._logits]
        for start in range(0, len(new), BLOCK):
            wanted = np.array(new[start : start + BLOCK])
            found = self._compare_logits(sequence, wanted)
            for row, position in enumerate(wanted.tolist()):
                self._logits[sequence, position] = take(found, row)
        return LogitDifference.join([self._logits[sequence, int(p)] for p in positions])

    def caches(self, sequence: int) -> list[KeyValueDifference]:
        """(key, value) of each layer, along the whole sequence."""
        if sequence not in self._caches:
            found = compare_caches(self.truth.key_values(sequence), self.noisy.key_values(sequence))
            if self.smooth is not None:
                whole = compare_caches(
                    self.truth.key_values(sequence), self.smooth.key_values(sequence)
                )
                found = [
                    (with_flips(key, whole_key), with_flips(value, whole_value))
                    for (key, value), (whole_key, whole_value) in zip(found, whole, strict=True)
                ]
            self._caches[sequence] = found
        return self._caches[sequence]

    def _compare_logits(self, sequence: int, positions: IntArray) -> LogitDifference:
        truth = self.truth.logits(sequence, positions)
        following = next_ids(self.sequences[sequence], positions)
        found = compare_logits(truth, self.noisy.logits(sequence, positions), following)
        if self.smooth is None:
            return found
        whole = compare_logits(truth, self.smooth.logits(sequence, positions), following)
        both = with_flips(found, whole)
        return replace(both, kld=add_shares(found.kld, whole.kld))


Difference = TypeVar("Difference", LogitDifference, TensorDifference)


def with_flips(found: Difference, whole: Difference) -> Difference:
    """A floor that allows for codes that fall on the other side; ``whole`` is all the rounding."""
    return replace(
        found,
        max_abs=found.max_abs + FLIP_SHARE * whole.max_abs,
        mean_square=add_shares(found.mean_square, whole.mean_square),
    )


def add_shares(found: FloatArray, whole: FloatArray) -> FloatArray:
    """Add the flips' share to something quadratic in the error."""
    both: FloatArray = (np.sqrt(found) + FLIP_SHARE * np.sqrt(whole)) ** 2
    return both


def compare_caches(
    truth: Sequence[KeyValue], found: Sequence[KeyValue]
) -> list[KeyValueDifference]:
    """(key, value) differences of each layer."""
    return [
        (
            compare_tensors(expected[0].transpose(0, 1), seen[0].transpose(0, 1)),
            compare_tensors(expected[1].transpose(0, 1), seen[1].transpose(0, 1)),
        )
        for expected, seen in zip(truth, found, strict=True)
    ]


class Yardstick:
    """Truth and noise floor for one set of weights; several runtimes may be held against it.

    Args:
        source: the weights that the runtimes should have.
        dtype: the runtimes' precision.
        options: seed, steps and the like.
        tokenizer: None leaves the text prompts out.
        has_wide_residual: of a ``dtype`` in half precision, all but the residual stream.

    Raises:
        InputError: a weight holds NaN or infinity, or cannot be read.
    """

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        options: VerifyOptions,
        tokenizer: Tokenizer | None = None,
        *,
        has_wide_residual: bool = False,
    ) -> None:
        self.config = source.config
        self.dtype = dtype
        self.options = options
        self.tokenizer = tokenizer
        self.exact: Gemma3 = load_reference(source, torch.float64)
        # Every stored type fits float64, so rounding from there is rounding from the source.
        self.rounded: Gemma3 = copy.deepcopy(self.exact).to(dtype)
        if has_wide_residual:
            widen_residual(self.rounded)
        self.sequences = sequences_for(source.config, options, tokenizer)
        self.sequences[0] = with_greedy_tokens(
            self.exact,
            self.sequences[0],
            decode_start(source.config, options),
            min(options.greedy_steps, options.decode_steps),
        )
        blocks = source.activation_blocks
        self.truth = self._truth(self.exact, blocks)
        noisy = self._truth(self.rounded, blocks)
        # Of a quantised graph, the same with float products; see activations.py.
        self.float_truth = ReferenceTruth(self.exact, self.sequences) if blocks else None
        smooth = ReferenceTruth(self.rounded, self.sequences) if blocks else None
        self.floor = NoiseFloor(self.truth, noisy, self.sequences, smooth)
        self.float_floor = (
            NoiseFloor(self.float_truth, smooth, self.sequences)
            if self.float_truth is not None and smooth is not None
            else None
        )

    def _truth(self, model: Gemma3, blocks: Mapping[str, int]) -> ReferenceTruth:
        rounding = ActivationRounding(model, blocks) if blocks else None
        return ReferenceTruth(model, self.sequences, rounding)


def next_ids(sequence: TokenSequence, positions: IntArray) -> list[int]:
    """The token after each position, -1 at the end."""
    return [
        int(sequence.ids[p + 1]) if p + 1 < len(sequence.ids) else -1 for p in positions.tolist()
    ]


def take(difference: LogitDifference, row: int) -> LogitDifference:
    """One position of a difference."""
    part = slice(row, row + 1)
    return LogitDifference(
        max_abs=difference.max_abs[part],
        mean_square=difference.mean_square[part],
        kld=difference.kld[part],
        scale=difference.scale[part],
        margin=difference.margin[part],
        is_same_top1=difference.is_same_top1[part],
        nll_truth=difference.nll_truth[part],
        nll=difference.nll[part],
    )
