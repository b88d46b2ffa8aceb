"""Decode steps over device buffers: the same text as from all logits, and few bytes moved.

On the CPU the steps compute real numbers; over the CUDA stub the numbers are meaningless and what
crosses the bus is counted.
"""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma3_export.cuda.stub import cuda_environment
from gemma3_export.device import CudaOptions, Device
from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.candidates import (
    SPARE_CANDIDATES,
    Candidates,
    batch_candidates_needed,
    best_per_row,
    candidates_from_top_k,
    candidates_needed,
)
from gemma3_export.runtimes.generation.sampling import Sampler, SamplingParams
from gemma3_export.runtimes.onnx.decode_steps import DeviceDecodeSteps, HelperSessions, Step
from gemma3_export.runtimes.onnx.graphs import (
    BLOCK_SELECTION_GRAPH,
    COPY_GRAPH,
    GREEDY_GRAPH,
    PREPARATION_GRAPH,
    PRODUCT_GRAPH,
    SELECTION_GRAPH,
)
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.onnx.session import cuda_provider_options
from tests.exporters.test_half_precision import half_bundle
from tests.support.cuda_formats import ONNX_FORMATS, CudaFormat
from tests.support.cuda_python import REPOSITORY, cuda_python
from tests.support.exported_bundles import exported_bundle
from tests.support.generation import generate
from tests.support.tiny_models import TINY

WORKER = REPOSITORY / "tests" / "support" / "decode_worker.py"
CACHE_WORKER = WORKER.with_name("cache_worker.py")
GREEDY = SamplingParams()
FILTERED = [
    GREEDY,
    SamplingParams(top_k=5, seed=3),
    SamplingParams(top_k=9, top_p=0.7, seed=3, temperature=2.0),
    SamplingParams(top_k=20, min_p=0.1, seed=9, temperature=1.5),
]
SYNCHRONIZATIONS = 9  # per step, as measured with onnxruntime 1.31.1; 6 with a CUDA graph
PROMPTS = [[2, 5, 9, 3], [2, 7, 8, 9, 10, 11, 4]]


@functools.cache
def runtime(dtype: str = "fp32") -> OnnxRuntime:
    bundle = exported_bundle("ort") if dtype == "fp32" else half_bundle(dtype)
    return OnnxRuntime(bundle, device="cpu", threads=1)


def completed(dtype: str, params: SamplingParams) -> list[tuple[int, ...]]:
    done = generate(runtime(dtype), PROMPTS, params, max_new_tokens=24, stop_token_ids=[]).collect()
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize("params", FILTERED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_candidates_give_the_text_that_all_logits_give(
    dtype: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = completed(dtype, params)
    monkeypatch.setattr(runtime(dtype), "decodes_on_device", True)
    fetched = []
    original = OnnxRuntime.step_candidates

    def observed(self: OnnxRuntime, *arguments: Any, **row: Any) -> Any:
        fetched.append(original(self, *arguments, **row))
        return fetched[-1]

    monkeypatch.setattr(OnnxRuntime, "step_candidates", observed)
    assert completed(dtype, params) == expected
    assert all(isinstance(row, Candidates) for rows in fetched for row in rows)


@pytest.mark.parametrize("params", FILTERED[:2], ids=["greedy", "top-k"])
def test_graphs_may_run_twice_as_they_do_when_they_are_captured(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime runs a graph and captures it in one call."""
    expected = completed("fp32", params)
    monkeypatch.setattr(runtime("fp32"), "decodes_on_device", True)
    original = Step.run

    def twice(self: Step) -> None:
        original(self)
        original(self)

    monkeypatch.setattr(Step, "run", twice)
    assert completed("fp32", params) == expected


@pytest.mark.parametrize("params", FILTERED[:2], ids=["greedy", "top-k"])
def test_candidates_may_be_asked_for_twice(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selection leaves the device ready for one next token, however often it runs."""
    expected = completed("fp32", params)
    monkeypatch.setattr(runtime("fp32"), "decodes_on_device", True)
    original = DeviceDecodeSteps.candidates

    def twice(self: DeviceDecodeSteps, needed: int) -> Any:
        original(self, needed)
        return original(self, needed)

    monkeypatch.setattr(DeviceDecodeSteps, "candidates", twice)
    assert completed("fp32", params) == expected


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("vocab_size", [1024, 1003], ids=["blocks", "a prime number"])
def test_the_device_selects_what_numpy_selects(rows: int, vocab_size: int) -> None:
    """Few levels make many ties, of which greedy decoding takes the first."""
    steps = object.__new__(DeviceDecodeSteps)
    helpers = HelperSessions(Device("cpu"), None)
    generator = np.random.default_rng(3)
    steps.rows, steps.vocab_size, steps.helpers = rows, vocab_size, helpers
    steps.selection = None
    for levels in (5, 100_000):
        logits = generator.integers(0, levels, (rows, 1, vocab_size)).astype(np.float32) / 8
        steps.logits = helpers.place(logits)
        steps.selection = None
        packed = steps._select(21)
        order = np.sort(logits[:, 0], axis=-1)[:, ::-1][:, :21]
        np.testing.assert_array_equal(packed[:, :21], order)
        ids = packed[:, 21:-1].astype(np.int64)
        np.testing.assert_array_equal(np.take_along_axis(logits[:, 0], ids, -1), order)
        np.testing.assert_allclose(packed[:, -1], logits.sum((1, 2)), rtol=1e-5)
        steps.greedy, steps.current = None, 0
        steps.states = [helpers.place(np.full((rows, 2), 7)) for _ in range(2)]
        steps.columns = helpers.place(np.arange(12)[None])
        ids_out, mask = np.zeros((rows, 1), np.int64), np.zeros((rows, 12), np.int64)
        steps.next_tokens = {
            "input_ids": helpers.place(ids_out),
            "attention_mask": helpers.place(mask),
        }
        best = steps._select_best()
        np.testing.assert_array_equal(best[:, 1], logits[:, 0].argmax(-1))
        np.testing.assert_array_equal(best[:, 0], logits[:, 0].max(-1))
        np.testing.assert_array_equal(
            steps.states[1].numpy(), np.stack((logits[:, 0].argmax(-1), [8] * rows), 1)
        )
        assert (steps.next_tokens["attention_mask"].numpy().sum(1) == 8).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_gets_all_its_logits(bad: float) -> None:
    packed = np.array([[3, 5, 1.5], [bad, 2, bad]], np.float32)
    everything = np.ones((2, 9), np.float32)
    first, second = best_per_row(packed, lambda: everything)
    assert isinstance(first, Candidates)
    assert (first.ids.tolist(), first.scores.tolist()) == ([5], [3.0])
    assert second is not None
    np.testing.assert_array_equal(second, everything[1])


@pytest.mark.parametrize("params", FILTERED)
@pytest.mark.parametrize("levels", [7, 10_000], ids=["many equals", "few equals"])
def test_a_sampler_chooses_the_same_from_candidates(params: SamplingParams, levels: int) -> None:
    size = 2000
    generator = np.random.default_rng(5)
    all_logits, candidates = Sampler(params), Sampler(params)
    needed = candidates_needed(params)
    assert needed is not None
    decided = 0
    for _ in range(40):
        logits = generator.integers(0, levels, size).astype(np.float32) / 100
        order = np.argsort(-logits, kind="stable")[: needed + SPARE_CANDIDATES]
        found = candidates_from_top_k(logits[order], order, float(logits.sum()), needed)
        expected = all_logits.sample(logits).token_id
        if found is None:
            candidates.position += 1
            continue
        decided += 1
        assert candidates.choose(found.ids, found.scores).token_id == expected
    assert decided == (0 if levels == 7 else 40)


@pytest.mark.parametrize("total", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_left_to_the_sampler(total: float) -> None:
    values = np.array([3, 2, 1], np.float32)
    assert candidates_from_top_k(values, np.arange(3), 6.0, 1) is not None
    assert candidates_from_top_k(values, np.arange(3), total, 1) is None


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logprobs=2),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(frequency_penalty=0.1),
        SamplingParams(presence_penalty=-0.1),
        SamplingParams(logit_bias={3: 1.0}),
        SamplingParams(temperature=1.0),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=5000),
    ],
)
def test_requests_that_need_all_logits_get_them(params: SamplingParams) -> None:
    assert candidates_needed(params) is None
    assert batch_candidates_needed([GREEDY, params], 10_000) is None


def test_a_batch_fetches_as_many_candidates_as_its_most_demanding_request() -> None:
    assert batch_candidates_needed([GREEDY, SamplingParams(top_k=40)], 10_000) == 40
    assert batch_candidates_needed([GREEDY], 1 + SPARE_CANDIDATES) is None, "as many as there are"


def test_the_helper_graphs_are_what_their_program_writes() -> None:
    from gemma3_export.runtimes.onnx.graphs.__main__ import GRAPHS, written

    assert set(GRAPHS) == {
        BLOCK_SELECTION_GRAPH,
        COPY_GRAPH,
        GREEDY_GRAPH,
        PREPARATION_GRAPH,
        PRODUCT_GRAPH,
        SELECTION_GRAPH,
    }
    for path, text in GRAPHS.items():
        assert path.read_bytes() == written(text), (
            "run python -m gemma3_export.runtimes.onnx.graphs"
        )


def test_cuda_options_are_checked() -> None:
    assert cuda_provider_options(CudaOptions(), Device("cuda", 2))["device_id"] == "2"
    assert cuda_provider_options(CudaOptions(), Device("cuda", 0))["use_tf32"] == "0", (
        "parity needs whole float32"
    )
    with pytest.raises(
        InputError, match="memory limit in bytes is 0; it must be an integer of at least 1"
    ):
        CudaOptions(memory_limit_bytes=0)


# --- on the CUDA stub -----------------------------------------------------------------------


def counted(bundle: Path, **changes: Any) -> dict[str, Any]:
    plan = {
        "rows": 1,
        "capacity": 40,
        "steps": 6,
        "prompt_tokens": 7,
        "graph": False,
        "device": "cuda:1",
        "top_k": 8,
    }
    python = cuda_python()
    with cuda_environment(python) as environment:
        done = subprocess.run(
            [str(python), "-P", str(WORKER), str(bundle), json.dumps(plan | changes)],
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "ONNX Runtime writes nothing into the text"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_stays_on_the_device(
    found: dict[str, Any], *, rows: int, graph: bool, top_k: int | None
) -> None:
    """Check that a step moves only the tokens to the device and the candidates back.

    A greedy step moves nothing to the device: it was left ready for the token that it selected.
    """
    fetched = 1 if top_k is None else top_k + SPARE_CANDIDATES
    moved = int(top_k is not None)
    for step in found["steps"][2:]:  # two steps warm up: arena, shapes, capture
        assert step["device_allocations"] == step["pinned_allocations"] == 0
        assert step["host_to_device_copies"] == moved
        assert step["host_to_device_bytes"] == 16 * rows * moved
        assert step["device_to_host_copies"] == 1
        assert step["device_to_host_bytes"] == 4 * (2 * fetched + 1) * rows
        assert step["synchronizations"] <= SYNCHRONIZATIONS
        assert step["capture_violations"] == 0
        if graph:
            assert step["graph_launches"] == 2 + moved, "the model, the selection, the new token"
            assert step["launches"] + step["library_calls"] == 0
        else:
            assert step["launches"] > 10 * TINY.num_hidden_layers
    captures = sum(step["graph_captures"] for step in found["steps"])
    assert captures == (2 + moved + (top_k is None) * 2 if graph else 0)


@pytest.mark.placement
@pytest.mark.parametrize("top_k", [None, 8], ids=["greedy", "top-k"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("graph", [False, True], ids=["launches", "CUDA graph"])
def test_generating_a_token_moves_a_few_hundred_bytes_and_allocates_nothing(
    graph: bool, rows: int, top_k: int | None
) -> None:
    found = counted(half_bundle("bf16"), graph=graph, rows=rows, top_k=top_k)
    assert found["described"]["device"] == "cuda:1"
    assert found["completions"] == [7] * rows
    assert_stays_on_the_device(found, rows=rows, graph=graph, top_k=top_k)


@pytest.mark.placement
@pytest.mark.parametrize(
    "form", [form for form in ONNX_FORMATS if form.is_fused], ids=lambda form: form.name
)
def test_every_fused_format_decodes_on_the_device(form: CudaFormat) -> None:
    found = counted(form.bundle(), graph=True, rows=2, top_k=None)
    assert_stays_on_the_device(found, rows=2, graph=True, top_k=None)


@pytest.mark.placement
@pytest.mark.parametrize("rows", [1, 4])
def test_a_graph_that_falls_back_does_not_stay_on_the_device(rows: int) -> None:
    """GroupQueryAttention has no float32 kernel on CUDA, so its inputs cross the bus and wait."""
    found = counted(exported_bundle("ort"), rows=rows)
    last = found["steps"][-1]
    assert last["host_to_device_copies"] > 2 * TINY.num_hidden_layers
    assert last["synchronizations"] > 4 * SYNCHRONIZATIONS
    with pytest.raises(AssertionError):
        assert_stays_on_the_device(found, rows=rows, graph=False, top_k=8)


@pytest.mark.placement
def test_without_candidates_all_logits_move() -> None:
    """Without selection many more bytes move, so the numbers above are its effect."""
    found = counted(half_bundle("bf16"), top_k=TINY.vocab_size)
    assert found["steps"][-1]["device_to_host_bytes"] >= 4 * TINY.vocab_size
    assert found["steps"][-1]["graph_launches"] == 0


@pytest.mark.placement
def test_a_cache_that_grows_refuses_a_cuda_graph() -> None:
    with pytest.raises(AssertionError, match="no CUDA graph can be captured"):
        counted(exported_bundle("portable"), graph=True)


@pytest.mark.placement
@pytest.mark.parametrize("clears", [True, False], ids=["cleared", "not cleared"])
def test_caches_on_the_device_start_with_zeros(clears: bool) -> None:
    """Kernels read beyond a row's last token; what was in memory before may be NaN."""
    python = cuda_python()
    with cuda_environment(python) as environment:
        done = subprocess.run(
            [str(python), "-P", str(CACHE_WORKER), str(half_bundle("bf16")), str(int(clears))],
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] > 0
    assert found["nonzero"] == (0 if clears else found["bytes"])
