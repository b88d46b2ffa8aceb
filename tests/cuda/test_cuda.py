"""Compare every format on a GPU with the reference, with the CPU, and with itself run differently.

The same tests run on the CPU with as much of the GPU's code as possible (decode steps at fixed
addresses, candidates), so they are known to work before a GPU is available. Every test run includes
one ONNX and one torch format; the slow tests include all formats. `make test-cuda` runs all of them
on a GPU, also with CUDA graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import Bundle
from gemma3_export.cuda.placement import PlacementReport, judge
from gemma3_export.device import CudaOptions, Device
from gemma3_export.parity import VerifyOptions, verify
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.runtimes.generation.candidates import Candidates
from gemma3_export.runtimes.generation.sampling import Sampler, SamplingParams
from gemma3_export.runtimes.onnx.session import cuda_provider_options
from gemma3_export.runtimes.protocol import KVCache, Logits
from tests.runtimes.test_device_decoding import FILTERED, GREEDY
from tests.support.cuda_formats import FORMATS, ONNX_FORMATS, CudaFormat
from tests.support.exported_bundles import exported_bundle
from tests.support.generation import generate
from tests.support.tiny_models import TINY

OPTIONS = VerifyOptions(decode_steps=12, greedy_steps=6)
W = TINY.sliding_window
NEW_TOKENS = 2 * W + 3
DRAWS = 200
# Ragged, and shorter and longer than the window before and after decoding
PROMPTS = [[2, 5, 9, 3], [2, 7, 8, 9, 10, 11, 4, 17, 20], [2, 40, 41, 42, 43, 44], [2]]
EVERY_RUN = {"bf16", "torchscript fp32"}


@dataclass(frozen=True)
class Place:
    """A format on a device."""

    format: CudaFormat
    device: str
    graph: bool = False  # run as a CUDA graph; GPU only

    def open(self) -> Any:
        return opened(self.format, self.device, self.graph)

    def but(self, *, graph: bool) -> Place:
        return Place(self.format, self.device, graph)


def places(*, graphs: bool = False) -> list[Any]:
    """Every format on the CPU and on a GPU; ``graphs`` are the formats that can be captured."""
    found = []
    for form in FORMATS:
        if graphs and not form.can_capture:
            continue
        marks = [] if form.name in EVERY_RUN else [pytest.mark.slow]
        found.append(pytest.param(Place(form, "cpu"), marks=marks, id=f"{form.name} on cpu"))
        on_gpu = pytest.param(
            Place(form, "cuda"), marks=pytest.mark.cuda, id=f"{form.name} on cuda"
        )
        found.append(on_gpu)
    return found


@functools.cache
def opened(form: CudaFormat, device: str, graph: bool) -> Any:
    options = CudaOptions(graph=graph)
    runtime = open_runtime(form.bundle(), form.runtime, device=device, threads=1, cuda=options)
    if form.runtime != "onnx" or form.is_fused:
        runtime.decodes_on_device = True  # as on a GPU
    return runtime


@functools.cache
def reference(form: CudaFormat, dtype: torch.dtype) -> ReferenceRuntime:
    """Return the reference model with the weights as the format stores them."""
    return ReferenceRuntime(load_reference(open_bundle_weights(Bundle(form.bundle())), dtype))


def both(form: CudaFormat, ids: Sequence[int]) -> tuple[Logits, float]:
    """Return exact logits [T, V] after each of ``ids``, and the error of the format's precision."""
    exact, rounded = (
        model.step(np.array([ids]), model.new_cache(1, len(ids)), num_logits=0)[0]
        for model in (
            reference(form, torch.float64),
            reference(form, getattr(torch, form.noise_floor_dtype)),
        )
    )
    return exact, float(np.abs(exact - rounded).max())


def texts(
    place: Place, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY
) -> list[tuple[int, ...]]:
    done = generate(
        place.open(), prompts, params, max_new_tokens=NEW_TOKENS, stop_token_ids=()
    ).collect()
    return [completion.token_ids for completion in done]


def assert_same_text(
    form: CudaFormat, prompt: Sequence[int], found: Sequence[int], expected: Sequence[int]
) -> None:
    """Check for equality, up to tokens that tie within the rounding of the format."""
    assert len(found) == len(expected)
    for place, (token, wanted) in enumerate(zip(found, expected, strict=True)):
        if token != wanted:
            exact, floor = both(form, [*prompt, *expected[:place]])
            assert abs(exact[-1, token] - exact[-1, wanted]) <= 2 * OPTIONS.factor * floor
            return


def assert_same_draws(
    place: Place,
    other: Place,
    params: SamplingParams,
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
) -> None:
    """Check two places' texts of ``PROMPTS``, up to draws that their logits' difference decides."""
    for row, (prompt, text, wanted) in enumerate(zip(PROMPTS, found, expected, strict=False)):
        if text == wanted:
            continue
        step = next(at for at in range(len(wanted)) if text[at] != wanted[at])
        ids = [*prompt, *wanted[:step]]
        one, two = (decoded_logits(runs.open(), ids) for runs in (place, other))
        drawn = possible_draws(replace(params, request_index=row), step, one, np.abs(one - two))
        assert {text[step], wanted[step]} <= drawn, (row, step)


def decoded_logits(runtime: Any, ids: Sequence[int]) -> Logits:
    """Return the logits [V] after ``ids``, of which the last few are decoded one by one."""
    cache = runtime.new_cache(1, len(ids) + 1)
    prefilled = max(1, len(ids) - 4)
    logits: Logits = runtime.step(np.array([ids[:prefilled]]), cache, num_logits=1)[0]
    if prefilled < len(ids):
        decode(runtime, cache, ids[prefilled:])
        logits = runtime.decode_steps(cache).fetch()
    return logits[0]


def possible_draws(
    params: SamplingParams, position: int, logits: Logits, difference: Logits
) -> set[int]:
    """Return the tokens that are drawn at ``position`` from logits about as different [V]."""
    generator = np.random.default_rng(1)
    drawn = set()
    for _ in range(DRAWS):
        sampler = Sampler(params)
        sampler.position = position
        noise = 2 * difference.max() * generator.uniform(-1, 1, logits.shape)
        drawn.add(sampler.sample((logits + noise).astype(np.float32)).token_id)
    return drawn


@pytest.mark.parametrize("place", places())
def test_parity_holds(place: Place) -> None:
    source = open_bundle_weights(Bundle(place.format.bundle()))
    report = verify(place.open(), source, options=OPTIONS)
    assert report.passed, report.to_json()
    assert report.noise_floor_dtype == place.format.noise_floor_dtype
    assert str(report.candidate["device"]).partition(":")[0] == place.device


@pytest.mark.parametrize("place", places())
def test_greedy_text_of_a_ragged_batch_is_the_reference_s(place: Place) -> None:
    model = reference(place.format, getattr(torch, place.format.noise_floor_dtype))
    done = generate(model, PROMPTS, GREEDY, max_new_tokens=NEW_TOKENS, stop_token_ids=()).collect()
    for prompt, found, wanted in zip(PROMPTS, texts(place, PROMPTS), done, strict=True):
        assert_same_text(place.format, prompt, found, wanted.token_ids)


@pytest.mark.parametrize("place", places())
def test_greedy_text_is_that_of_the_cpu(place: Place) -> None:
    plain = open_runtime(place.format.bundle(), place.format.runtime, device="cpu", threads=1)
    done = generate(plain, PROMPTS, GREEDY, max_new_tokens=NEW_TOKENS, stop_token_ids=()).collect()
    for prompt, found, wanted in zip(PROMPTS, texts(place, PROMPTS), done, strict=True):
        assert_same_text(place.format, prompt, found, wanted.token_ids)


@pytest.mark.parametrize("place", places())
def test_rows_of_a_batch_are_what_they_are_alone(place: Place) -> None:
    for prompt, found in zip(PROMPTS, texts(place, PROMPTS), strict=True):
        (alone,) = texts(place, [prompt])
        assert_same_text(place.format, prompt, found, alone)


@pytest.mark.parametrize("params", FILTERED[1:])
@pytest.mark.parametrize("place", places())
def test_a_seed_gives_the_same_text(place: Place, params: SamplingParams) -> None:
    found = texts(place, PROMPTS, params)
    assert texts(place, PROMPTS, params) == found
    if place.format.noise_floor_dtype == "float32":  # in half precision, rounding may change a draw
        model = reference(place.format, torch.float32)
        done = generate(model, PROMPTS, params, max_new_tokens=NEW_TOKENS, stop_token_ids=())
        assert [completion.token_ids for completion in done.collect()] == found


def test_equal_logits_allow_no_other_draw() -> None:
    """So the texts of two runs that compute the same must be equal."""
    place = Place(FORMATS[0], "cpu")
    logits = decoded_logits(place.open(), PROMPTS[0])
    same, other = np.zeros_like(logits), np.full_like(logits, 0.05)
    for params in FILTERED:
        for position in range(4):
            assert len(possible_draws(params, position, logits, same)) == 1
    assert len(possible_draws(FILTERED[1], 0, logits, other)) > 1
    text = texts(place, PROMPTS[:1], FILTERED[1])
    wrong = texts(place, PROMPTS[:1], replace(FILTERED[1], seed=4))
    assert text != wrong
    with pytest.raises(AssertionError):
        assert_same_draws(place, place, FILTERED[1], wrong, text)


@pytest.mark.parametrize("params", FILTERED)
@pytest.mark.parametrize("place", places(graphs=True))
def test_a_cuda_graph_changes_no_token(place: Place, params: SamplingParams) -> None:
    launched = texts(place, PROMPTS, params)
    captured = place.but(graph=True)
    assert_same_draws(captured, place, params, texts(captured, PROMPTS, params), launched)
    for_one = texts(captured, PROMPTS[:1], params)  # a second graph, for another cache
    assert_same_draws(captured, place, params, for_one, texts(place, PROMPTS[:1], params))
    assert_same_draws(captured, place, params, texts(captured, PROMPTS, params), launched)


@pytest.mark.parametrize("place", places(graphs=True))
def test_a_step_brings_candidates(place: Place) -> None:
    for graph in (False, True):
        runtime = place.but(graph=graph).open()
        cache = runtime.new_cache(2, 8)
        runtime.step(np.array([[2, 5, 9]]), cache, num_logits=1, row=0)
        runtime.step(np.array([[2]]), cache, num_logits=1, row=1)
        found = runtime.step_candidates(np.array([[3], [4]]), cache, [GREEDY, GREEDY])
        assert [type(row) for row in found] == [Candidates, Candidates]
        assert cache.lengths.tolist() == [4, 2]


def decode(runtime: Any, cache: KVCache, tokens: Sequence[int]) -> None:
    """Feed ``tokens`` one by one, as the generation loop does."""
    for token in tokens:
        ids = np.array([[token]])
        if runtime.step_candidates(ids, cache, [GREEDY]) is None:
            runtime.step(ids, cache, num_logits=1)


@pytest.mark.parametrize("kept", [1, W - 1, W, W + 1, 2 * W + 3])
@pytest.mark.parametrize("place", places())
def test_tokens_that_are_cut_off_leave_no_trace(place: Place, kept: int) -> None:
    graph = place.device == "cuda" and place.format.can_capture
    runtime = place.but(graph=graph).open()
    ids = np.random.default_rng(kept).integers(3, TINY.vocab_size, 2 * W + 9).tolist()
    other = ids[::-1][:4]
    cache = runtime.new_cache(1, 64)
    runtime.step(np.array([ids[:-3]]), cache, num_logits=1)
    decode(runtime, cache, ids[-3:])
    cache.truncate(0, kept)
    decode(runtime, cache, other[:2])
    found = runtime.step(np.array([other[2:]]), cache, num_logits=0)[0]
    exact, floor = both(place.format, [*ids[:kept], *other])
    np.testing.assert_allclose(found, exact[-2:], rtol=0, atol=OPTIONS.factor * floor)
    assert cache.lengths.tolist() == [kept + 4]


@pytest.mark.parametrize("place", places())
def test_the_cache_is_on_the_device(place: Place) -> None:
    runtime = place.open()
    cache = runtime.new_cache(2, 16)
    runtime.step(np.array([[2, 5, 9]]), cache, num_logits=1, row=0)
    runtime.step(np.array([[2]]), cache, num_logits=1, row=1)
    runtime.step(np.array([[2], [3]]), cache, num_logits=1)
    if place.format.runtime == "onnx":
        buffers = cache.buffers if place.format.is_fused else cache.joined
        devices = {buffer.device_name() for buffer in buffers}
    else:
        devices = {buffer.device.type for buffer in cache.buffers}
    assert devices == {place.device}


def placement_of(bundle: Bundle) -> PlacementReport:
    """Check where a real session places the graph's nodes."""
    from gemma3_export.cuda.partition_worker import partition

    graph = bundle.graph("onnx").path
    options = cuda_provider_options(CudaOptions(), Device("cuda"))
    return judge(graph, partition(str(bundle.file(graph)), **options))


@pytest.mark.cuda
@pytest.mark.parametrize("form", ONNX_FORMATS, ids=lambda form: form.name)
def test_nothing_falls_back_to_the_cpu(form: CudaFormat) -> None:
    """session.disable_cpu_ep_fallback would also reject shape scalars on the CPU."""
    report = placement_of(Bundle(form.bundle()))
    assert report.passed, report.problems


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)
def test_a_session_on_the_cpu_is_not_taken_for_one_on_a_gpu() -> None:
    (problem,) = placement_of(Bundle(exported_bundle("ort"))).problems
    assert problem.startswith("the session does not use CUDAExecutionProvider")
