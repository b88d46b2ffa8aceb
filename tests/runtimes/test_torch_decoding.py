"""Decode steps of equal shapes on torch: what they compute, and that the host waits for nothing.

`test_cuda.py` holds the text that they give to the reference's, on the CPU too.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.candidates import Candidates
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import IntArray
from gemma3_export.runtimes.torch import decode_steps as torch_decoding
from gemma3_export.runtimes.torch.cache import TorchCache
from gemma3_export.runtimes.torch.decode_steps import TorchDecodeSteps
from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime
from tests.exporters.test_torchscript import exported, load_plainly
from tests.support.observed_runs import VARIANTS

CONFIG = VARIANTS["tied"]
GREEDY = SamplingParams()
TOLERANCE = 1e-5  # absolute; values are about 1, and two correct float32 runs differ by 1e-6


def open_fixed() -> TorchScriptRuntime:
    runtime = TorchScriptRuntime(exported(), device="cpu")
    runtime.decodes_on_device = True  # as on a GPU
    return runtime


def prefilled(runtime: TorchScriptRuntime, capacity: int = 20) -> TorchCache:
    """Return a cache of two rows, on both sides of the window of 6."""
    cache = runtime.new_cache(2, capacity)
    runtime.step(np.array([[2, 5, 9]]), cache, num_logits=1, row=0)
    runtime.step(np.array([[2, 7, 8, 9, 10, 11, 4, 5]]), cache, num_logits=1, row=1)
    return cache


def assert_equal_caches(one: TorchCache, other: TorchCache) -> None:
    assert one.lengths.tolist() == other.lengths.tolist()
    for row in range(one.batch_size):
        for pair, expected in zip(one.read(row), other.read(row), strict=True):
            np.testing.assert_allclose(pair, expected, atol=TOLERANCE)


def test_logits_and_caches_are_those_of_plain_steps() -> None:
    fixed, plain = open_fixed(), TorchScriptRuntime(exported(), device="cpu")
    caches = prefilled(fixed), prefilled(plain)
    ids = np.array([[11], [12]])
    for _ in range(8):
        found = fixed.step_candidates(ids, caches[0], [GREEDY, GREEDY])
        logits = plain.step(ids, caches[1], num_logits=1)[:, 0]
        assert found is not None
        np.testing.assert_allclose(fixed.decode_steps(caches[0]).fetch(), logits, atol=TOLERANCE)
        for row, scores in zip(found, logits, strict=True):
            assert isinstance(row, Candidates)
            assert row.ids[row.scores.argmax()] == scores.argmax()
        ids = logits.argmax(-1, keepdims=True)
    assert_equal_caches(*caches)


def test_plain_steps_in_between_and_cut_off_tokens_are_seen() -> None:
    """A plain step writes after the longest row; the gap is closed before the next fixed step."""
    fixed, plain = open_fixed(), TorchScriptRuntime(exported(), device="cpu")
    caches = prefilled(fixed), prefilled(plain)
    ids = np.array([[11], [12]])
    for runtime, cache in zip((fixed, plain), caches, strict=True):
        runtime.step(ids, cache, num_logits=1)
        step(runtime, ids + 5, cache)
        cache.truncate(1, 7)
        step(runtime, ids + 9, cache)
    assert_equal_caches(*caches)


def step(runtime: TorchScriptRuntime, ids: IntArray, cache: TorchCache) -> None:
    """Take a fixed step if the runtime has them, otherwise a plain one."""
    if runtime.step_candidates(ids, cache, [GREEDY, GREEDY]) is None:
        runtime.step(ids, cache, num_logits=1)


def test_the_last_position_can_be_used_and_none_after_it() -> None:
    runtime = open_fixed()
    cache = prefilled(runtime, capacity=9)
    ids = np.array([[11], [12]])
    assert runtime.step_candidates(ids, cache, [GREEDY, GREEDY]) is not None
    with pytest.raises(InputError, match="holds 9 of 9 tokens"):
        runtime.step_candidates(ids, cache, [GREEDY, GREEDY])
    assert cache.lengths.tolist() == [4, 9]


def test_buffers_stay_where_they_are() -> None:
    runtime = open_fixed()
    cache = prefilled(runtime)
    addresses = [buffer.data_ptr() for buffer in cache.buffers]
    for _ in range(3):
        runtime.step_candidates(np.array([[11], [12]]), cache, [GREEDY, GREEDY])
    assert [buffer.data_ptr() for buffer in cache.buffers] == addresses


@torch.inference_mode()
def test_decode_steps_are_released_with_their_cache() -> None:
    runtime = open_fixed()
    cache = prefilled(runtime)
    steps = weakref.ref(runtime.decode_steps(cache))
    assert runtime.decode_steps(cache) is steps()
    del cache
    gc.collect()
    assert steps() is None


def test_a_step_reads_nothing_on_the_host() -> None:
    """The meta device has no values, so reading one, which would wait for a GPU, fails."""
    cache = TorchCache(CONFIG, 2, 20, dtype=torch.float32, device=torch.device("meta"))
    count = torch.ones(1, dtype=torch.int64)
    steps = TorchDecodeSteps(load_plainly(exported(), "meta"), cache, count, captures=False)
    with torch.jit.optimized_execution(False):
        steps.compute()
    assert steps.logits is not None
    assert steps.logits.device.type == "meta"
    assert steps.logits.shape == (2, CONFIG.vocab_size)
    with pytest.raises(RuntimeError, match="meta"):
        steps.state.max().item()


class FakeCuda:
    """Records calls to CUDA; a replay repeats what was captured, as a device would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        capture = torch_decoding.captured

        def remembering(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
            self.compute = compute
            return capture(compute, device)

        monkeypatch.setattr(torch_decoding, "captured", remembering)

    def current_stream(self, device: Any) -> FakeCuda:
        return self

    Stream = current_stream

    def wait_stream(self, other: Any) -> None:
        self.calls.append("wait")

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.calls.append("aside")
        yield

    def CUDAGraph(self) -> FakeCuda:  # noqa: N802  (torch's name)
        return self

    @contextmanager
    def graph(self, graph: Any) -> Any:
        self.calls.append("capture")
        yield

    def replay(self) -> None:
        self.calls.append("replay")
        self.compute()


def test_a_step_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the control flow is tested here; `make test-cuda` tests the rest."""
    runtime, plain = open_fixed(), open_fixed()
    runtime.captures = True
    caches = prefilled(runtime), prefilled(plain)
    fake = FakeCuda(monkeypatch)
    for step in range(3):
        ids = np.array([[11 + step], [12]])
        runtime.step_candidates(ids, caches[0], [GREEDY, GREEDY])
        plain.step_candidates(ids, caches[1], [GREEDY, GREEDY])
    assert fake.calls == ["wait", "aside", "wait", "capture", "replay", "replay", "replay"]
    assert_equal_caches(*caches)
