"""The yardstick: the truth, and how far the reference's own rounding strays from it.

Nobody sets a tolerance by hand. The truth is the reference in float64; the noise floor is the error
of the same reference in the runtime's precision, on the same tokens, in the same run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from gemma3_export.parity.differences import (
    BLOCK,
    LogitDifference,
    TensorDifference,
    compare_logits,
    compare_tensors,
)
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.prompts import TokenSequence, decode_start, sequences_for
from gemma3_export.parity.truth import ReferenceTruth, Truth, with_greedy_tokens
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.weights import WeightSource
from gemma3_export.runtimes.protocol import IntArray
from gemma3_export.tokenizer import Tokenizer

__all__ = ["NoiseFloor", "Yardstick"]

KeyValueDifference = tuple[TensorDifference, TensorDifference]


class NoiseFloor:
    """Errors of a noisy truth against the truth, computed once for each place."""

    def __init__(self, truth: Truth, noisy: Truth, sequences: Sequence[TokenSequence]) -> None:
        self.truth, self.noisy, self.sequences = truth, noisy, sequences
        self._logits: dict[tuple[int, int], LogitDifference] = {}
        self._caches: dict[int, list[KeyValueDifference]] = {}

    def logits(self, sequence: int, positions: IntArray) -> LogitDifference:
        """At each of ``positions``."""
        new = [int(p) for p in positions if (sequence, int(p)) not in self._logits]
        for start in range(0, len(new), BLOCK):
            wanted = np.array(new[start : start + BLOCK])
            found = compare_logits(
                self.truth.logits(sequence, wanted),
                self.noisy.logits(sequence, wanted),
                next_ids(self.sequences[sequence], wanted),
            )
            for row, position in enumerate(wanted.tolist()):
                self._logits[sequence, position] = take(found, row)
        return LogitDifference.join([self._logits[sequence, int(p)] for p in positions])

    def caches(self, sequence: int) -> list[KeyValueDifference]:
        """(key, value) of each layer, along the whole sequence."""
        if sequence not in self._caches:
            pairs = zip(
                self.truth.key_values(sequence), self.noisy.key_values(sequence), strict=True
            )
            self._caches[sequence] = [
                (
                    compare_tensors(truth[0].transpose(0, 1), noisy[0].transpose(0, 1)),
                    compare_tensors(truth[1].transpose(0, 1), noisy[1].transpose(0, 1)),
                )
                for truth, noisy in pairs
            ]
        return self._caches[sequence]


class Yardstick:
    """Truth and noise floor for one set of weights; several runtimes may be held against it.

    Args:
        source: the weights that the runtimes should have.
        dtype: the runtimes' precision.
        options: seed, steps and the like.
        tokenizer: None leaves the text prompts out.

    Raises:
        InputError: a weight holds NaN or infinity, or cannot be read.
    """

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        options: VerifyOptions,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = source.config
        self.dtype = dtype
        self.options = options
        self.exact: Gemma3 = load_reference(source, torch.float64)
        # Every stored type fits float64, so rounding from there is rounding from the source.
        self.rounded: Gemma3 = copy.deepcopy(self.exact).to(dtype)
        self.sequences = sequences_for(source.config, options, tokenizer)
        self.sequences[0] = with_greedy_tokens(
            self.exact,
            self.sequences[0],
            decode_start(source.config, options),
            min(options.greedy_steps, options.decode_steps),
        )
        self.truth = ReferenceTruth(self.exact, self.sequences)
        self.floor = NoiseFloor(
            self.truth, ReferenceTruth(self.rounded, self.sequences), self.sequences
        )


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
