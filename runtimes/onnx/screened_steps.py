"""Decode steps on the CPU that fetch candidates from a screened head instead of all logits.

See :mod:`gemma3_export.exporters.onnx.screened_head` for what the graph proves about them.

Shapes: B rows, C capacity, V vocabulary, N candidates.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle.signature import Signature
from gemma3_export.runtimes.generation.candidates import Candidates
from gemma3_export.runtimes.onnx.caches import SharedCache
from gemma3_export.runtimes.onnx.session import import_onnxruntime
from gemma3_export.runtimes.protocol import IntArray, Logits

__all__ = ["ScreenedSteps", "has_known_grid"]

# What the kernel rounds its inputs to is part of the proof. Elsewhere it may be another grid.
KNOWN_MACHINES = ("x86_64", "AMD64")
FIRST_PAUSE, LONGEST_PAUSE = 4, 256  # steps without screening after one that was of no use


def has_known_grid() -> bool:
    """Whether this processor's kernels round as the screened head takes for granted."""
    return platform.machine() in KNOWN_MACHINES


class ScreenedSteps:
    """One token for each row of one cache, again and again.

    Where a model's logits lie so close together that screening leaves too many, it is given up for
    a while, longer each time.

    Args:
        session: of a graph with a screened head.
        signature: of that graph.
        cache: its buffers never move.
    """

    def __init__(self, session: Any, signature: Signature, cache: SharedCache) -> None:
        assert signature.num_candidates is not None
        self.session, self.signature = session, signature
        self.binding = session.io_binding()
        self.bind_results()
        cache.bind(self.binding, None)
        self.bind_count(signature.num_logits_to_keep.name, 1)
        self.count = 0
        self.pause = FIRST_PAUSE
        self.paused = 0  # steps to go

    def bind_results(self) -> None:
        """Let the graph allocate what has another size in every step; first of all outputs."""
        for spec in (self.signature.logits, *self.signature.candidates):
            self.binding.bind_output(spec.name, "cpu")

    def bind_count(self, name: str, count: int) -> None:
        """Bind an input with a default, which takes OrtValues only."""
        value = import_onnxruntime().OrtValue.ortvalue_from_numpy(np.array([count], np.int64))
        self.binding.bind_ortvalue_input(name, value)

    def is_paused(self) -> bool:
        """Whether the next step is better taken with all logits; asked once a step."""
        self.paused = max(0, self.paused - 1)
        return self.paused > 0

    def run(
        self, input_ids: IntArray, cache: SharedCache, needed: int
    ) -> list[Candidates | Logits]:
        """Feed ``input_ids`` [B, 1]; for each row candidates, or [V] where they do not suffice.

        Args:
            input_ids: the rows' newest tokens.
            cache: advances by one token.
            needed: how many of the largest logits have to be complete.
        """
        signature = self.signature
        if needed != self.count:
            assert signature.num_candidates is not None
            self.bind_count(signature.num_candidates.name, needed)
            self.count = needed
        mask = cache.attention_mask(1, None)
        self.binding.bind_cpu_input(signature.input_ids.name, np.ascontiguousarray(input_ids))
        self.binding.bind_cpu_input(signature.attention_mask.name, mask)
        self.bind_results()
        cache.begin(1, None)
        self.session.run_with_iobinding(self.binding)
        cache.advance(self.binding, 1, None)
        logits, rows, ids, scores = (value.numpy() for value in self.binding.get_outputs()[:4])
        if len(scores):
            self.pause = FIRST_PAUSE
            vocab_size = logits.shape[-1]
            return [
                complete(ids[rows == row], scores[rows == row], needed, vocab_size)
                for row in range(cache.batch_size)
            ]
        self.paused = self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return list(logits[:, -1])


def complete(
    ids: NDArray[np.int64], scores: NDArray[np.float32], needed: int, vocab_size: int
) -> Candidates | Logits:
    """Of one row's candidates [N], ids ascending, those not below the last one ``needed``.

    Others are left out since there may be more like them. A row with fewer than that has a state
    that is not finite, so neither is any of its logits [V].
    """
    if len(scores) < needed:
        return np.full(vocab_size, np.nan, np.float32)
    is_kept = scores >= np.partition(scores, -needed)[-needed]
    return Candidates(ids[is_kept], scores[is_kept])
