"""Single-token decode steps over preallocated buffers, which fetch candidates instead of logits.

:class:`DeviceDecodeSteps` is for GPUs: a step moves the new tokens to the device and the candidates
back; with a CUDA graph it is one launch. :class:`ScreenedDecodeSteps` is for graphs with a screened
head on the CPU.

Shapes: B rows of the cache, R rows of a step, C capacity, V vocabulary, k candidates requested, N
candidates found.
"""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import Signature
from gemma3_export.device import CudaOptions, Device
from gemma3_export.runtimes.generation.candidates import (
    SPARE_CANDIDATES,
    Candidates,
    best_per_row,
    candidates_per_row,
)
from gemma3_export.runtimes.onnx.caches import InPlaceCache
from gemma3_export.runtimes.onnx.graphs import (
    BLOCK_SELECTION_GRAPH,
    GREEDY_GRAPH,
    PREPARATION_GRAPH,
    SELECTION_GRAPH,
)
from gemma3_export.runtimes.onnx.session import import_onnxruntime, open_session
from gemma3_export.runtimes.protocol import IntArray, Logits, check_capacity

__all__ = [
    "DeviceDecodeSteps",
    "HelperSessions",
    "ScreenedDecodeSteps",
    "has_known_rounding",
]

GRAPH_ID = "gpu_graph_id"  # run option: which captured CUDA graph to replay
# The screened head's proof includes how the kernel rounds its inputs; elsewhere that may differ.
KNOWN_MACHINES = ("x86_64", "AMD64")
LARGEST_BLOCK = 64  # logits
FIRST_PAUSE, LONGEST_PAUSE = 4, 256  # steps without screening after one that did not help


class HelperSessions:
    """Sessions of the small graphs that write masks and select candidates on one device.

    Args:
        device: where they run.
        cuda: options of the CUDA provider; with a CUDA graph, each binding is captured on its own.
    """

    def __init__(self, device: Device, cuda: CudaOptions | None) -> None:
        self.device, self.cuda = device, cuda
        self._graph_ids = itertools.count(1)  # 0 is ONNX Runtime's default

    @functools.cached_property
    def preparation(self) -> Any:
        """The session of :data:`PREPARATION_GRAPH`."""
        return self._open(PREPARATION_GRAPH)

    @functools.cached_property
    def greedy(self) -> Any:
        """The session of :data:`GREEDY_GRAPH`."""
        return self._open(GREEDY_GRAPH)

    @functools.cached_property
    def selection(self) -> Any:
        """The session of :data:`SELECTION_GRAPH`."""
        return self._open(SELECTION_GRAPH)

    @functools.cached_property
    def block_selection(self) -> Any:
        """The session of :data:`BLOCK_SELECTION_GRAPH`."""
        return self._open(BLOCK_SELECTION_GRAPH)

    def _open(self, graph: Path) -> Any:
        return open_session(graph, self.device, threads=1, cuda=self.cuda)

    def run_options(self) -> Any:
        """Return options for the runs of one binding, whose addresses must not change."""
        options = import_onnxruntime().RunOptions()
        if self.cuda and self.cuda.graph:
            options.add_run_config_entry(GRAPH_ID, str(next(self._graph_ids)))
        return options

    def place(self, array: np.ndarray[Any, Any]) -> Any:
        """Return a copy of ``array`` on the device."""
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(
            array, self.device.kind, self.device.index
        )


class Step:
    """One graph with everything bound to fixed addresses.

    No output may be at the address of an input, since a run may be repeated.

    Args:
        session: the graph's session.
        options: the run options.
        inputs: OrtValues by name.
        outputs: OrtValues by name.
    """

    def __init__(
        self,
        session: Any,
        options: Any,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
    ) -> None:
        self.session, self.options = session, options
        self.binding = session.io_binding()
        for name, value in inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Run the graph."""
        self.session.run_with_iobinding(self.binding, self.options)


class DeviceDecodeSteps:
    """Decode steps of one cache, whose tensors stay on the device at fixed addresses.

    A step computes every row of the cache. Rows that do not take part are fed a token at a position
    beyond those that they hold, which the next token there overwrites.

    A greedy step leaves the device ready for the token that it selects: if that token comes back as
    the next input, nothing has to be moved there.

    Args:
        session: the model's session.
        signature: the interface of the model's graph.
        cache: the cache, whose buffers never move; it must outlive the steps.
        vocab_size: V.
        helpers: sessions of the small graphs.
        options: options for the model's runs, with the CUDA graph to capture, if any.
    """

    def __init__(
        self,
        session: Any,
        signature: Signature,
        cache: InPlaceCache,
        vocab_size: int,
        helpers: HelperSessions,
        options: Any,
    ) -> None:
        rows, place = cache.batch_size, helpers.place
        self.rows, self.vocab_size, self.helpers = rows, vocab_size, helpers
        # Greedy steps read one state and write the other: ONNX Runtime runs a graph twice in the
        # call that captures it, so no graph may replace what it reads.
        self.states = [place(np.zeros((rows, 2), np.int64)) for _ in range(2)]
        self.current = 0  # the state of the last step; a greedy selection writes the other
        self.ids = place(np.zeros((rows, 1), np.int64))
        self.columns = place(np.arange(cache.capacity, dtype=np.int64)[None])
        self.mask = place(np.zeros((rows, cache.capacity), np.int64))
        self.logits = place(np.zeros((rows, 1, vocab_size), np.float32))
        count = import_onnxruntime().OrtValue.ortvalue_from_numpy(np.ones(1, np.int64))
        self.step = Step(
            session,
            options,
            {
                signature.input_ids.name: self.ids,
                signature.attention_mask.name: self.mask,
                signature.num_logits_to_keep.name: count,
            },
            {signature.logits.name: self.logits},
        )
        cache.bind(self.step.binding, range(rows))
        self.next_tokens = {"input_ids": self.ids, "attention_mask": self.mask}
        self.preparation = Step(
            helpers.preparation,
            helpers.run_options(),
            {"state": self.states[0], "columns": self.columns},
            self.next_tokens,
        )
        self.active = range(rows)  # rows that took part in the last step
        self.lengths: IntArray = np.zeros((rows, 1), np.int64)  # that the device has, after it
        self.prepared: IntArray | None = None  # the next step that the device is ready for
        self.greedy: tuple[list[Step], Any] | None = None
        self.selection: tuple[int, Step, Any] | None = None

    def run(self, input_ids: IntArray, cache: InPlaceCache, rows: range) -> None:
        """Compute the logits that follow ``input_ids`` [R, 1]; they stay on the device."""
        check_capacity(cache, 1, 0, cache.batch_size)
        state = np.zeros((cache.batch_size, 2), np.int64)
        state[rows.start : rows.stop, :1] = input_ids
        state[:, 1] = cache.lengths + 1
        if self.prepared is not None and is_ready_for(self.prepared, state, rows, cache.capacity):
            state = self.prepared
            self.current = 1 - self.current
        else:
            self.current = 0
            self.states[0].update_inplace(state)
            self.preparation.run()
        self.prepared = None
        self.step.run()
        cache.advance(self.step.binding, 1, rows)
        self.active, self.lengths = rows, state[:, 1:]

    def fetch(self) -> Logits:
        """Return all logits [R, V] of the last step."""
        logits: Logits = self.logits.numpy()[self.active.start : self.active.stop, 0]
        return logits

    def candidates(self, needed: int) -> list[Candidates | Logits]:
        """Return what decides each row's next token: candidates, or all logits [V].

        Args:
            needed: how many of the largest logits have to be complete, ties with the last of them
                included; of a single one, the first of equals is enough.
        """
        first, end = self.active.start, self.active.stop
        if needed == 1:
            packed = self._select_best()
            self.prepared = np.concatenate((packed[:, 1:2].astype(np.int64), self.lengths + 1), 1)
            return best_per_row(packed[first:end], self.fetch)
        fetched = needed + SPARE_CANDIDATES
        return candidates_per_row(self._select(fetched)[first:end], fetched, needed, self.fetch)

    def _select_best(self) -> Logits:
        """Return [B, 3]: the largest logit, its id and the sum of all logits."""
        if self.greedy is None:
            helpers = self.helpers
            packed = helpers.place(np.zeros((self.rows, 1, 3), np.float32))
            steps = [
                Step(
                    helpers.greedy,
                    helpers.run_options(),
                    {"logits": self.logits, "state": state, "columns": self.columns},
                    {"packed": packed, "next_state": next_state, **self.next_tokens},
                )
                for state, next_state in (self.states, reversed(self.states))
            ]
            self.greedy = steps, packed
        steps, packed = self.greedy
        steps[self.current].run()
        found: Logits = packed.numpy()[:, 0]
        return found

    def _select(self, count: int) -> Logits:
        """Return [B, 2 * count + 1]: values, largest first, ids, and the sum of all logits."""
        if self.selection is None or self.selection[0] != count:
            self.selection = (count, *self._bind_selection(count))
        _, step, packed = self.selection
        step.run()
        found: Logits = packed.numpy()[:, 0]
        return found

    def _bind_selection(self, count: int) -> tuple[Step, Any]:
        helpers = self.helpers
        packed = helpers.place(np.zeros((self.rows, 1, 2 * count + 1), np.float32))
        size = import_onnxruntime().OrtValue.ortvalue_from_numpy(np.array([count], np.int64))
        inputs = {"logits": self.logits, "count": size}
        session = helpers.selection
        width = block_width(self.vocab_size, count)
        if self.rows > 1 and width > 1:
            session = helpers.block_selection
            ids = np.arange(self.vocab_size, dtype=np.float32)
            inputs["columns"] = helpers.place(ids.reshape(-1, width))
        return Step(session, helpers.run_options(), inputs, {"packed": packed}), packed


def is_ready_for(prepared: IntArray, state: IntArray, rows: range, capacity: int) -> bool:
    """Return whether a device with the state ``prepared`` can run a step that needs ``state``.

    Args:
        prepared: [B, 2] the next token of each row, and the row's length with it.
        state: [B, 2] the same, as the step needs it.
        rows: rows that take part; others only have to keep what they hold.
        capacity: C.
    """
    at, lengths = slice(rows.start, rows.stop), prepared[:, 1]
    return bool(
        np.array_equal(prepared[at], state[at])
        and (lengths >= state[:, 1]).all()
        and (lengths <= capacity).all()
    )


def block_width(vocab_size: int, count: int) -> int:
    """Return how many logits a block has, so that equal blocks fill the vocabulary.

    There are at least ``count`` blocks. ONNX Runtime's TopK takes 1.4 ms for 8 rows of 262,144
    logits on an H100, and 0.1 ms by way of the maxima of blocks of 64.
    """
    widths = range(min(LARGEST_BLOCK, vocab_size // count), 0, -1)
    return next(width for width in widths if vocab_size % width == 0)


def has_known_rounding() -> bool:
    """Return whether this processor's kernels round as the screened head assumes."""
    return platform.machine() in KNOWN_MACHINES


class ScreenedDecodeSteps:
    """Decode steps of one cache on the CPU, with candidates from a screened head.

    :mod:`gemma3_export.exporters.onnx.screened_head` describes what the graph proves about them.
    If a model's logits are so close together that screening leaves too many candidates, it is
    paused, for longer each time.

    Args:
        session: the session of a graph with a screened head.
        signature: the interface of that graph.
    """

    def __init__(self, session: Any, signature: Signature) -> None:
        assert signature.num_candidates is not None
        self.session, self.signature = session, signature
        self.bindings: dict[range, Any] = {}
        self.counts: dict[range, int] = {}  # candidates that each binding asks for
        self.pause = FIRST_PAUSE
        self.paused = 0  # steps left

    def binding(self, cache: InPlaceCache, rows: range, needed: int) -> Any:
        """Return a binding of a step of ``rows`` that asks for ``needed`` candidates."""
        signature = self.signature
        if rows not in self.bindings:
            self.bindings[rows] = binding = self.session.io_binding()
            self.bind_results(binding)
            cache.bind(binding, rows)
            self.bind_count(binding, signature.num_logits_to_keep.name, 1)
        binding = self.bindings[rows]
        if self.counts.get(rows) != needed:
            assert signature.num_candidates is not None
            self.bind_count(binding, signature.num_candidates.name, needed)
            self.counts[rows] = needed
        return binding

    def bind_results(self, binding: Any) -> None:
        """Let the graph allocate outputs whose size changes per step; they come first."""
        for spec in (self.signature.logits, *self.signature.candidates):
            binding.bind_output(spec.name, "cpu")

    def bind_count(self, binding: Any, name: str, count: int) -> None:
        """Bind an input that has a default, which only accepts OrtValues."""
        value = import_onnxruntime().OrtValue.ortvalue_from_numpy(np.array([count], np.int64))
        binding.bind_ortvalue_input(name, value)

    def is_paused(self) -> bool:
        """Return whether the next step should compute all logits; call once per step."""
        self.paused = max(0, self.paused - 1)
        return self.paused > 0

    def run(
        self, input_ids: IntArray, cache: InPlaceCache, needed: int, rows: range
    ) -> list[Candidates | Logits]:
        """Feed ``input_ids`` [R, 1]; return candidates per row, or all logits if too few.

        Args:
            input_ids: the newest token of each row.
            cache: the cache, always the same one; its ``rows`` advance by one token.
            needed: how many of the largest logits have to be complete.
            rows: adjacent rows.
        """
        signature, binding = self.signature, self.binding(cache, rows, needed)
        mask = cache.attention_mask(1, rows)
        binding.bind_cpu_input(signature.input_ids.name, np.ascontiguousarray(input_ids))
        binding.bind_cpu_input(signature.attention_mask.name, mask)
        self.bind_results(binding)
        cache.begin(1, rows)
        self.session.run_with_iobinding(binding)
        cache.advance(binding, 1, rows)
        logits, places, ids, scores = (value.numpy() for value in binding.get_outputs()[:4])
        if len(scores):
            self.pause = FIRST_PAUSE
            vocab_size = logits.shape[-1]
            return [
                complete(ids[places == place], scores[places == place], needed, vocab_size)
                for place in range(len(rows))
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
