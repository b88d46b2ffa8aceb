"""What the logits and caches should be: one uncached pass of the reference over each sequence.

Causality makes a prefix's logits and keys those of the whole sequence, so one pass answers every
case. The head, most of a small model's arithmetic, runs on the positions that are asked for only.

Shapes: B batch rows (1), S tokens, P positions, D hidden size, V vocabulary, K key-value heads,
H head size, L layers.
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
from gemma3_export.parity.sequences import Observation, TeacherForcing, TokenSequence
from gemma3_export.reference.model import Gemma3, KeyValue
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = ["ReferenceTruth", "RuntimeTruth", "Truth", "with_greedy_tokens"]

RECENT_BYTES = 384 * 2**20  # logits that are remembered
BASELINE_CHUNK = 64  # tokens a step when another runtime is the baseline


class Truth(Protocol):
    """Where expected values come from."""

    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """[P, V] float64 logits of a sequence at ``positions``."""

    def key_values(self, sequence: int) -> list[KeyValue]:
        """One (key, value) a layer, each [K, S, H], over the whole sequence."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one uncached forward pass leaves behind."""

    normed: Tensor  # [S, D] input of the head
    key_values: list[KeyValue]  # each [K, S, H]


class ReferenceTruth:
    """The reference model over the sequences, each computed when it is first asked for.

    ``rounding`` rounds its activations, as 8-bit kernels do.
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
        self.passes: dict[int, Pass] = {}
        self.recent: dict[tuple[int, int], Tensor] = {}  # logits [V], the latest last

    @torch.inference_mode()
    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """See :class:`Truth`."""
        places = [(sequence, position) for position in positions.tolist()]
        new = [place for place in places if place not in self.recent]
        if new:
            normed = self._pass(sequence).normed[[position for _, position in new]]
            with self._arithmetic():
                logits = self.model.head(normed, self.model.head_weight)
            self.recent |= dict(zip(new, logits, strict=True))
        wanted = torch.stack([self.recent[place] for place in places]).double()
        # Cases come back to the same positions; what is too much for the memory is computed anew.
        room = RECENT_BYTES // (wanted.shape[1] * 8)
        for place in list(self.recent)[: max(0, len(self.recent) - room)]:
            del self.recent[place]
        return wanted

    def key_values(self, sequence: int) -> list[KeyValue]:
        """See :class:`Truth`."""
        return self._pass(sequence).key_values

    @torch.inference_mode()
    def _pass(self, sequence: int) -> Pass:
        if sequence not in self.passes:
            ids = torch.from_numpy(self.sequences[sequence].ids)[None]
            with self._arithmetic():
                normed, cache = self.model.hidden_states(ids)
            key_values = [(key[0], value[0]) for key, value in cache]
            self.passes[sequence] = Pass(normed[0], key_values)
        return self.passes[sequence]

    def _arithmetic(self) -> AbstractContextManager[None]:
        return nullcontext() if self.rounding is None else self.rounding.on()


class RuntimeTruth:
    """Another runtime as the baseline: it walks each sequence once and keeps what is needed."""

    def __init__(
        self, runtime: Runtime, sequences: Sequence[TokenSequence], needed: dict[int, set[int]]
    ) -> None:
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.caches: dict[int, list[KeyValue]] = {}
        for index, sequence in enumerate(sequences):
            walk = TeacherForcing(runtime, sequences, [index])
            while left := len(sequence.ids) - walk.fed[0]:
                for seen in walk.step(min(left, BASELINE_CHUNK)):
                    self._keep(seen, needed.get(index, set()))
            (cache,) = walk.read()
            self.caches[index] = [
                (torch.from_numpy(key).double(), torch.from_numpy(value).double())
                for key, value in cache.layers
            ]

    def _keep(self, seen: Observation, needed: set[int]) -> None:
        for row, position in enumerate(seen.positions.tolist()):
            if position in needed:
                self.kept[seen.sequence, position] = torch.from_numpy(seen.logits[row].copy())

    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """See :class:`Truth`."""
        return torch.stack([self.kept[sequence, int(p)] for p in positions]).double()

    def key_values(self, sequence: int) -> list[KeyValue]:
        """See :class:`Truth`."""
        return self.caches[sequence]


@torch.inference_mode()
def with_greedy_tokens(
    model: Gemma3, sequence: TokenSequence, start: int, count: int
) -> TokenSequence:
    """The sequence with the reference's own choices at [start, start + count).

    Decoding is then compared on the tokens that a user would see, and a runtime that chooses
    another one of two equals is led back to the reference's choice.
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
