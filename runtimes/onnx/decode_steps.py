"""Decode steps whose tensors stay where they are: on the device, at fixed addresses.

A step moves the new token to the device and the candidates back. Cache, mask and logits are
allocated once for a cache; with a CUDA graph the whole step is one launch.

Shapes: B rows, C capacity, V vocabulary, k candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma3_export.bundle.signature import Signature
from gemma3_export.device import Device
from gemma3_export.runtimes.generation.candidates import Candidates, candidates_of_rows
from gemma3_export.runtimes.onnx.caches import SharedCache
from gemma3_export.runtimes.onnx.graphs import PREPARATION_GRAPH, SELECTION_GRAPH
from gemma3_export.runtimes.onnx.session import import_onnxruntime, open_session
from gemma3_export.runtimes.protocol import IntArray, Logits

__all__ = ["DecodeSteps", "SideSessions"]

GRAPH_ID = "gpu_graph_id"  # a run option: which captured CUDA graph to replay


class SideSessions:
    """The tiny graphs that write masks and choose candidates, opened on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.preparation = open_session(PREPARATION_GRAPH, device, threads=1)
        self.selection = open_session(SELECTION_GRAPH, device, threads=1)


class DecodeSteps:
    """One token for each row of one cache, again and again.

    Args:
        session: of the model.
        signature: of the model's graph.
        cache: its buffers never move.
        vocab_size: V.
        sides: the tiny graphs' sessions.
        graph_id: of the CUDA graph to capture in the first step; None runs without one.
    """

    def __init__(
        self,
        session: Any,
        signature: Signature,
        cache: SharedCache,
        vocab_size: int,
        sides: SideSessions,
        graph_id: int | None,
    ) -> None:
        ort = import_onnxruntime()
        device, rows = sides.device, cache.batch_size
        self.session = session  # not the cache, which owns its steps

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
        self.preparation = sides.preparation
        self.prepared = sides.preparation.io_binding()
        self.prepared.bind_ortvalue_input("state", self.state)
        self.prepared.bind_ortvalue_input("columns", self.columns)
        self.prepared.bind_ortvalue_output("input_ids", self.ids)
        self.prepared.bind_ortvalue_output("attention_mask", self.mask)
        self.selection = Selection(sides.selection, self.logits, rows)

    def run(self, input_ids: IntArray, cache: SharedCache) -> None:
        """Compute the logits that follow ``input_ids`` [B, 1]; they stay on the device."""
        state = np.concatenate((input_ids, cache.lengths[:, None] + 1), axis=1)
        self.state.update_inplace(state)
        self.preparation.run_with_iobinding(self.prepared)
        self.session.run_with_iobinding(self.binding, self.options)
        cache.advance(self.binding, 1, None)

    def fetch(self) -> Logits:
        """[B, V] all logits of the last step."""
        logits: Logits = self.logits.numpy()[:, 0]
        return logits

    def candidates(self, fetched: int, needed: int) -> list[Candidates | Logits]:
        """See :func:`gemma3_export.runtimes.generation.candidates.candidates_of_rows`."""
        return candidates_of_rows(self.selection.run(fetched), fetched, needed, self.fetch)


class Selection:
    """The largest logits of each row, brought to the host."""

    def __init__(self, session: Any, logits: Any, rows: int) -> None:
        self.session, self.logits, self.rows = session, logits, rows
        self.count = 0
        self.binding: Any = None

    def run(self, count: int) -> Logits:
        """[B, 2 * count + 1]: values, largest first, their ids, and the sum of all logits."""
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
