"""Compute expected logits and caches: one uncached forward pass per sequence.

With a causal mask, the logits and keys of a prefix are those of the whole sequence, so one pass
serves every case. The head, most of a small model's arithmetic, runs on requested positions only.

Shapes: S tokens, P positions, D hidden size, V vocabulary, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gemma3_export.parity.rounding import ActivationRounding
from gemma3_export.parity.sequences import LogitObservation, TeacherForcing, TokenSequence
from gemma3_export.reference.model import Gemma3, KeyValue
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = [
    "ExpectedFromReference",
    "ExpectedFromRuntime",
    "ExpectedValues",
    "with_greedy_tokens",
]

RECENT_BYTES = 384 * 2**20  # size of the cache of logits
BASELINE_CHUNK = 64  # tokens per step when another runtime is the baseline


class ExpectedValues(Protocol):
    """A source of expected values."""

    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """Return the logits [P, V] float64 of a sequence at ``positions``."""

    def key_values(self, sequence: int) -> list[KeyValue]:
        """Return (key, value) per layer over the whole sequence, each [K, S, H]."""


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The result of one uncached forward pass."""

    normed: Tensor  # [S, D] input of the head
    key_values: list[KeyValue]  # each [K, S, H]


class ExpectedFromReference:
    """Values of the reference model. Each sequence is processed on first use.

    Args:
        model: the reference in some precision.
        sequences: the sequences that indices refer to.
        rounding: rounds the model's activations as 8-bit kernels do.
    """

    def __init__(
        self,
        model: Gemma3,
        sequences: Sequence[TokenSequence],
        rounding: ActivationRounding | None = None,
    ) -> None:
        self.model = model
        self.rounding = rounding
        self.sequences = sequences
        self.passes: dict[int, ForwardPass] = {}
        self.recent: dict[tuple[int, int], Tensor] = {}  # logits [V], most recent last

    @torch.inference_mode()
    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """See :class:`ExpectedValues`."""
        keys = [(sequence, position) for position in positions.tolist()]
        new = [key for key in keys if key not in self.recent]
        if new:
            normed = self._forward(sequence).normed[[position for _, position in new]]
            with self._arithmetic():
                logits = self.model.head(normed, self.model.head_weight)
            self.recent |= dict(zip(new, logits, strict=True))
        result = torch.stack([self.recent[key] for key in keys]).double()
        # Cases return to the same positions. Logits that do not fit are evicted and recomputed.
        capacity = RECENT_BYTES // (result.shape[1] * 8)
        for key in list(self.recent)[: max(0, len(self.recent) - capacity)]:
            del self.recent[key]
        return result

    def key_values(self, sequence: int) -> list[KeyValue]:
        """See :class:`ExpectedValues`."""
        return self._forward(sequence).key_values

    @torch.inference_mode()
    def _forward(self, sequence: int) -> ForwardPass:
        if sequence not in self.passes:
            ids = torch.from_numpy(self.sequences[sequence].ids)[None]
            with self._arithmetic():
                normed, cache = self.model.hidden_states(ids)
            key_values = [(key[0], value[0]) for key, value in cache]
            self.passes[sequence] = ForwardPass(normed[0], key_values)
        return self.passes[sequence]

    def _arithmetic(self) -> AbstractContextManager[None]:
        return nullcontext() if self.rounding is None else self.rounding.enabled()


class ExpectedFromRuntime:
    """Values of another runtime, the baseline, which processes each sequence once.

    Args:
        runtime: the baseline.
        sequences: the sequences to process.
        needed: the positions of each sequence whose logits to keep.
    """

    def __init__(
        self, runtime: Runtime, sequences: Sequence[TokenSequence], needed: dict[int, set[int]]
    ) -> None:
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.caches: dict[int, list[KeyValue]] = {}
        for index, sequence in enumerate(sequences):
            feed = TeacherForcing(runtime, sequences, [index])
            while left := len(sequence.ids) - feed.fed[0]:
                for item in feed.step(min(left, BASELINE_CHUNK)):
                    self._keep(item, needed.get(index, set()))
            (cache,) = feed.read()
            self.caches[index] = [
                (torch.from_numpy(key).double(), torch.from_numpy(value).double())
                for key, value in cache.layers
            ]

    def _keep(self, item: LogitObservation, needed: set[int]) -> None:
        for row, position in enumerate(item.positions.tolist()):
            if position in needed:
                self.kept[item.sequence, position] = torch.from_numpy(item.logits[row].copy())

    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """See :class:`ExpectedValues`."""
        return torch.stack([self.kept[sequence, int(p)] for p in positions]).double()

    def key_values(self, sequence: int) -> list[KeyValue]:
        """See :class:`ExpectedValues`."""
        return self.caches[sequence]


@torch.inference_mode()
def with_greedy_tokens(
    model: Gemma3, sequence: TokenSequence, start: int, count: int
) -> TokenSequence:
    """Return the sequence with the reference's greedy tokens at [start, start + count).

    The decode steps are then compared on tokens that a user would see. A runtime that chooses the
    other of two tied tokens continues from the reference's choice.
    """
    ids = sequence.ids.copy()
    past: list[KeyValue] | None = None
    first = 0
    for position in range(start, min(start + count, len(ids))):
        new = torch.from_numpy(ids[None, first:position])
        output = model(new, None, past, num_logits_to_keep=1)
        past, first = output.past_key_values, position
        ids[position] = int(output.logits[0, -1].argmax())
    return replace(sequence, ids=np.ascontiguousarray(ids))
