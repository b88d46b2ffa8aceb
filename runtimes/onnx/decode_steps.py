"""Single-token decode steps over preallocated buffers, which fetch candidates instead of logits.

:class:`DeviceDecodeSteps` is for GPUs: a step moves the new tokens to the device and the candidates
back; with a CUDA graph it is one launch. :class:`ScreenedDecodeSteps` is for graphs with a screened
head on the CPU.

Shapes: B rows, C capacity, V vocabulary, k candidates requested, N candidates found.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import Signature
from gemma3_export.device import Device
from gemma3_export.runtimes.generation.candidates import Candidates, candidates_per_row
from gemma3_export.runtimes.onnx.caches import InPlaceCache
from gemma3_export.runtimes.onnx.graphs import PREPARATION_GRAPH, SELECTION_GRAPH
from gemma3_export.runtimes.onnx.session import import_onnxruntime, open_session
from gemma3_export.runtimes.protocol import IntArray, Logits

__all__ = [
    "DeviceDecodeSteps",
    "HelperSessions",
    "ScreenedDecodeSteps",
    "has_known_rounding",
]

GRAPH_ID = "gpu_graph_id"  # run option: which captured CUDA graph to replay
# The screened head's proof includes how the kernel rounds its inputs; elsewhere that may differ.
KNOWN_MACHINES = ("x86_64", "AMD64")
FIRST_PAUSE, LONGEST_PAUSE = 4, 256  # steps without screening after one that did not help


class HelperSessions:
    """Sessions of the small graphs that write masks and select candidates on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.preparation = open_session(PREPARATION_GRAPH, device, threads=1)
        self.selection = open_session(SELECTION_GRAPH, device, threads=1)


class DeviceDecodeSteps:
    """Decode steps of all rows of one cache, whose tensors stay on the device at fixed addresses.

    Args:
        session: the model's session.
        signature: the interface of the model's graph.
        cache: the cache, whose buffers never move; it must outlive the steps.
        vocab_size: V.
        helpers: sessions of the small graphs.
        graph_id: the CUDA graph to capture in the first step; None runs without one.
    """

    def __init__(
        self,
        session: Any,
        signature: Signature,
        cache: InPlaceCache,
        vocab_size: int,
        helpers: HelperSessions,
        graph_id: int | None,
    ) -> None:
        ort = import_onnxruntime()
        device, rows = helpers.device, cache.batch_size
        self.session = session

        def place(array: np.ndarray[Any, Any]) -> Any:
            return ort.OrtValue.ortvalue_from_numpy(array, device.kind, device.index)

        self.state = place(np.zeros((rows, 2), np.int64))
        self.ids = place(np.zeros((rows, 1), np.int64))
        self.columns = place(np.arange(cache.capacity, dtype=np.int64)[None])
        self.mask = place(np.zeros((rows, cache.capacity), np.int64))
        self.logits = place(np.zeros((rows, 1, vocab_size), np.float32))
        self.binding = session.io_binding()
        cache.bind(self.binding, None)
        self.binding.bind_ortvalue_input(signature.input_ids.name, self.ids)
        self.binding.bind_ortvalue_input(signature.attention_mask.name, self.mask)
        count = ort.OrtValue.ortvalue_from_numpy(np.ones(1, np.int64))
        self.binding.bind_ortvalue_input(signature.num_logits_to_keep.name, count)
        self.binding.bind_ortvalue_output(signature.logits.name, self.logits)
        self.options = ort.RunOptions()
        if graph_id is not None:
            self.options.add_run_config_entry(GRAPH_ID, str(graph_id))
        self.preparation = helpers.preparation
        self.prepared = helpers.preparation.io_binding()
        self.prepared.bind_ortvalue_input("state", self.state)
        self.prepared.bind_ortvalue_input("columns", self.columns)
        self.prepared.bind_ortvalue_output("input_ids", self.ids)
        self.prepared.bind_ortvalue_output("attention_mask", self.mask)
        self.selection = Selection(helpers.selection, self.logits, rows)

    def run(self, input_ids: IntArray, cache: InPlaceCache) -> None:
        """Compute the logits that follow ``input_ids`` [B, 1]; they stay on the device."""
        state = np.concatenate((input_ids, cache.lengths[:, None] + 1), axis=1)
        self.state.update_inplace(state)
        self.preparation.run_with_iobinding(self.prepared)
        self.session.run_with_iobinding(self.binding, self.options)
        cache.advance(self.binding, 1, None)

    def fetch(self) -> Logits:
        """Return all logits [B, V] of the last step."""
        logits: Logits = self.logits.numpy()[:, 0]
        return logits

    def candidates(self, fetched: int, needed: int) -> list[Candidates | Logits]:
        """See :func:`gemma3_export.runtimes.generation.candidates.candidates_per_row`."""
        return candidates_per_row(self.selection.run(fetched), fetched, needed, self.fetch)


class Selection:
    """Fetches the largest logits of each row."""

    def __init__(self, session: Any, logits: Any, rows: int) -> None:
        self.session, self.logits, self.rows = session, logits, rows
        self.count = 0
        self.binding: Any = None

    def run(self, count: int) -> Logits:
        """Return [B, 2 * count + 1]: values, largest first, ids, and the sum of all logits."""
        if count != self.count:
            self._bind(count)
        self.session.run_with_iobinding(self.binding)
        return self.packed[:, 0]

    def _bind(self, count: int) -> None:
        ort = import_onnxruntime()
        self.count = count
        self.packed = np.empty((self.rows, 1, 2 * count + 1), np.float32)
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input("logits", self.logits)
        self.binding.bind_ortvalue_input(
            "count", ort.OrtValue.ortvalue_from_numpy(np.array([count], np.int64))
        )
        shape, address = list(self.packed.shape), self.packed.ctypes.data
        self.binding.bind_output("packed", "cpu", 0, np.float32, shape, address)


def has_known_rounding() -> bool:
    """Return whether this processor's kernels round as the screened head assumes."""
    return platform.machine() in KNOWN_MACHINES


class ScreenedDecodeSteps:
    """Decode steps on the CPU that fetch candidates from a screened head instead of all logits.

    :mod:`gemma3_export.exporters.onnx.screened_head` describes what the graph proves about them.
    If a model's logits are so close together that screening leaves too many candidates, it is
    paused, for longer each time.

    Args:
        session: the session of a graph with a screened head.
        signature: the interface of that graph.
        cache: the cache, whose buffers never move; it must outlive the steps.
    """

    def __init__(self, session: Any, signature: Signature, cache: InPlaceCache) -> None:
        assert signature.num_candidates is not None
        self.session, self.signature = session, signature
        self.binding = session.io_binding()
        self.bind_results()
        cache.bind(self.binding, None)
        self.bind_count(signature.num_logits_to_keep.name, 1)
        self.count = 0
        self.pause = FIRST_PAUSE
        self.paused = 0  # steps left

    def bind_results(self) -> None:
        """Let the graph allocate outputs whose size changes per step; they come first."""
        for spec in (self.signature.logits, *self.signature.candidates):
            self.binding.bind_output(spec.name, "cpu")

    def bind_count(self, name: str, count: int) -> None:
        """Bind an input that has a default, which only accepts OrtValues."""
        value = import_onnxruntime().OrtValue.ortvalue_from_numpy(np.array([count], np.int64))
        self.binding.bind_ortvalue_input(name, value)

    def is_paused(self) -> bool:
        """Return whether the next step should compute all logits; call once per step."""
        self.paused = max(0, self.paused - 1)
        return self.paused > 0

    def run(
        self, input_ids: IntArray, cache: InPlaceCache, needed: int
    ) -> list[Candidates | Logits]:
        """Feed ``input_ids`` [B, 1]; return candidates per row, or all logits if too few.

        Args:
            input_ids: the newest token of each row.
            cache: the cache, which advances by one token.
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
    """Return one row's candidates that are no smaller than the last of the ``needed`` largest.

    Smaller ones are dropped, because screening may have missed others like them. A row with fewer
    candidates than ``needed`` has a hidden state that is not finite, so all its logits are NaN.

    Args:
        ids: [N] ascending.
        scores: [N] their logits.
        needed: how many of the largest logits have to be complete.
        vocab_size: V.
    """
    if len(scores) < needed:
        return np.full(vocab_size, np.nan, np.float32)
    is_kept = scores >= np.partition(scores, -needed)[-needed]
    return Candidates(ids[is_kept], scores[is_kept])
