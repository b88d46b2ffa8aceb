"""Define where expected logits and caches come from: the reference, or another runtime.

With a causal mask, the logits and keys of a prefix are those of the whole sequence, so one uncached
pass per sequence serves every case. The head, most of a small model's arithmetic, runs on requested
positions only.

Shapes: S tokens, P positions, D hidden size, V vocabulary, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gemma3_export.parity.sequences import LogitObservation, TeacherForcing, TokenSequence
from gemma3_export.parity.stored_logits import PositionKey, StoredLogits
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import LayerwiseForward
from gemma3_export.reference.model import KeyValue
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = [
    "ExpectedFromReference",
    "ExpectedFromRuntime",
    "ExpectedLogits",
    "ExpectedValues",
    "FullPrecisionLogits",
    "with_greedy_tokens",
]

BASELINE_CHUNK = 64  # tokens per step when another runtime is the baseline


class ExpectedLogits(Protocol):
    """A source of expected logits."""

    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """Return the logits [P, V] float64 of a sequence at ``positions``."""


class ExpectedValues(ExpectedLogits, Protocol):
    """A source of expected values."""

    def key_values(self, sequence: int) -> list[KeyValue]:
        """Return (key, value) per layer over the whole sequence, each [K, S, H]."""


@dataclass(kw_only=True, slots=True)
class ExpectedFromReference:
    """Values of the reference in float64."""

    stored: StoredLogits
    compute: Callable[[Sequence[PositionKey]], None]  # stores the logits of these positions
    caches: list[list[KeyValue]] = field(default_factory=list)  # of each sequence

    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """See :class:`ExpectedValues`."""
        keys = [(sequence, position) for position in positions.tolist()]
        self.compute(keys)
        return self.stored.read(keys)

    def key_values(self, sequence: int) -> list[KeyValue]:
        """See :class:`ExpectedValues`."""
        return self.caches[sequence]


class FullPrecisionLogits:
    """Logits of the reference in float32, at every position of ``sequences``.

    The head is kept in memory, because a measurement on held-out text reads it hundreds of times.

    Args:
        source: the weights in full precision.
        sequences: the sequences that indices refer to.
        progress: called with the stage and how much of it is done.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """

    @torch.inference_mode()
    def __init__(
        self, source: WeightSource, sequences: Sequence[TokenSequence], progress: Progress
    ) -> None:
        stage = "computing full-precision values"
        batches = [torch.from_numpy(sequence.ids)[None] for sequence in sequences]
        tokens = [len(sequence.ids) for sequence in sequences]
        total = sum(tokens) * source.config.num_hidden_layers
        done = 0
        forward = LayerwiseForward(source, batches)
        for _ in forward.layers():
            for batch, count in enumerate(tokens):
                progress(stage, done, total)
                forward.step(batch)
                done += count
        norm = forward.final_norm()
        self.normed: list[Tensor] = [norm(states)[0] for states in forward.states]
        name = source.config.head_name
        self.head = torch.empty(source.config.vocab_size, source.config.hidden_size)
        first = 0
        for chunk in source.chunks(name):
            check_finite(name, chunk)
            self.head[first : first + len(chunk)] = chunk
            first += len(chunk)
        progress(stage, total, total)

    @torch.inference_mode()
    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """Return the logits [P, V] float32 of a sequence at ``positions``."""
        return self.normed[sequence][torch.from_numpy(positions)] @ self.head.T


class ExpectedFromRuntime:
    """Values of another runtime, the baseline, which processes each sequence once.

    Args:
        runtime: the baseline.
        sequences: the sequences to process.
        needed: the positions of each sequence whose logits to keep.
        vocab_size: V of the candidate; the baseline may have padding rows after it.
    """

    def __init__(
        self,
        runtime: Runtime,
        sequences: Sequence[TokenSequence],
        needed: dict[int, set[int]],
        vocab_size: int,
    ) -> None:
        self.kept = StoredLogits(vocab_size, torch.float32)
        self.caches: dict[int, list[KeyValue]] = {}
        for index, sequence in enumerate(sequences):
            feed = TeacherForcing(runtime, sequences, [index])
            while left := len(sequence.ids) - feed.fed[0]:
                for item in feed.step(min(left, BASELINE_CHUNK)):
                    self._keep(item, needed.get(index, set()))
            (cache,) = feed.read()
            self.caches[index] = [
                (torch.from_numpy(key), torch.from_numpy(value)) for key, value in cache.layers
            ]

    def _keep(self, item: LogitObservation, needed: set[int]) -> None:
        rows = [row for row, position in enumerate(item.positions.tolist()) if position in needed]
        keys = [(item.sequence, int(item.positions[row])) for row in rows]
        self.kept.add(keys)
        self.kept.write(keys, 0, torch.from_numpy(item.logits[rows, : self.kept.vocab_size]))

    def logits(self, sequence: int, positions: IntArray) -> Tensor:
        """See :class:`ExpectedValues`."""
        return self.kept.read([(sequence, int(p)) for p in positions]).double()

    def key_values(self, sequence: int) -> list[KeyValue]:
        """See :class:`ExpectedValues`."""
        return self.caches[sequence]


def with_greedy_tokens(
    runtime: Runtime, sequence: TokenSequence, start: int, count: int
) -> TokenSequence:
    """Return the sequence with the tokens that ``runtime`` chooses at [start, start + count).

    The decode steps are then compared on tokens that a user would see. Expected values are those of
    the reference on the same tokens, whatever the runtime chose.
    """
    ids = sequence.ids.copy()
    stop = min(start + count, len(ids))
    cache = runtime.new_cache(1, len(ids))
    first = 0
    for position in range(start, stop):
        logits = runtime.step(ids[None, first:position], cache, num_logits=1)
        first = position
        ids[position] = int(logits[0, -1, : runtime.config.vocab_size].argmax())
    return replace(sequence, ids=np.ascontiguousarray(ids))
