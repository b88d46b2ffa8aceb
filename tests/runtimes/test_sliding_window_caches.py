"""Sliding-window caches: the same numbers, in bounded memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.parity import VerifyOptions, verify
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.speculation import Drafter, PromptLookup
from gemma3_export.runtimes.onnx.caches import SlidingWindowCache
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import KVCache
from tests.support.exported_bundles import exported_bundle, source_of
from tests.support.generation import generate
from tests.support.tiny_models import TINY

TOLERANCE = 1e-5  # absolute; logits are about 1, and two correct float32 runs differ by 1e-6
W = TINY.sliding_window
SLIDING = [layer for layer in range(TINY.num_hidden_layers) if TINY.is_sliding(layer)]


@functools.cache
def runtime(*, sliding_window_cache: bool) -> OnnxRuntime:
    return OnnxRuntime(
        exported_bundle("ort"), device="cpu", threads=1, sliding_window_cache=sliding_window_cache
    )


def ids_of(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (1, length))


def assert_same(sliding: KVCache, full: KVCache, row: int = 0) -> None:
    """Check that a sliding row holds the end of the full one, at least its window."""
    length = int(full.lengths[row])
    assert sliding.lengths[row] == length
    for layer, (ours, theirs) in enumerate(zip(sliding.read(row), full.read(row), strict=True)):
        for found, expected in zip(ours, theirs, strict=True):
            count = found.shape[1]
            assert count >= min(length, W)
            assert layer in SLIDING or count == length
            np.testing.assert_allclose(found, expected[:, length - count :], atol=TOLERANCE)


def test_steps_of_any_size_give_what_full_caches_give() -> None:
    ids = ids_of(9 * W)
    caches = {
        windowed: runtime(sliding_window_cache=windowed).new_cache(1, 60)
        for windowed in (True, False)
    }
    start = 0
    for size in (3, W + 1, 1, 1, 2 * W + 5, 1, 2, W - 1, 1, 1):
        part = ids[:, start : start + size]
        logits = [
            runtime(sliding_window_cache=windowed).step(part, cache, num_logits=0)
            for windowed, cache in caches.items()
        ]
        np.testing.assert_allclose(*logits, atol=TOLERANCE)
        assert_same(caches[True], caches[False])
        start += size
    held = caches[True].read(0)
    assert {held[layer][0].shape[1] for layer in SLIDING} < set(range(W, 2 * W + 1))


def test_memory_grows_with_the_text_in_full_layers_only() -> None:
    short, long = (runtime(sliding_window_cache=True).new_cache(2, size) for size in (2 * W, 60))
    assert isinstance(short, SlidingWindowCache)
    assert isinstance(long, SlidingWindowCache)
    for index, (few, many) in enumerate(zip(short.arrays, long.arrays, strict=True)):
        if index // 2 in SLIDING:
            assert few.shape == many.shape
            assert few.shape[2] == 2 * W  # the margin of a small window is the window
        else:
            assert (few.shape[2], many.shape[2]) == (2 * W, 60)


def test_rows_of_different_length_evict_independently() -> None:
    both = [runtime(sliding_window_cache=windowed) for windowed in (True, False)]
    caches = [each.new_cache(3, 60) for each in both]
    for row, length in enumerate((W - 2, 2 * W + 1, 4)):
        for each, cache in zip(both, caches, strict=True):
            each.step(ids_of(length, seed=row), cache, num_logits=1, row=row)
    for step in range(2 * W):
        ids = np.random.default_rng(step).integers(0, TINY.vocab_size, (3, 1))
        logits = [
            each.step(ids, cache, num_logits=1) for each, cache in zip(both, caches, strict=True)
        ]
        np.testing.assert_allclose(*logits, atol=TOLERANCE)
    for row in range(3):
        assert_same(caches[0], caches[1], row)


@pytest.mark.parametrize("drafted", range(2, W + 1))
@pytest.mark.parametrize("before", [2 * W - 1, 2 * W, 2 * W + 1, 3 * W])
def test_any_part_of_a_step_can_be_cut_off(before: int, drafted: int) -> None:
    ids, other = ids_of(before + drafted), ids_of(4, seed=2)
    for kept in range(before, before + drafted + 1):
        caches = []
        for windowed in (True, False):
            cache = runtime(sliding_window_cache=windowed).new_cache(1, 60)
            runtime(sliding_window_cache=windowed).step(ids[:, :before], cache, num_logits=1)
            runtime(sliding_window_cache=windowed).step(ids[:, before:], cache, num_logits=1)
            cache.truncate(0, kept)
            caches.append(cache)
        assert_same(caches[0], caches[1])
        logits = [
            runtime(sliding_window_cache=windowed).step(other, cache, num_logits=0)
            for windowed, cache in zip((True, False), caches, strict=True)
        ]
        np.testing.assert_allclose(*logits, atol=TOLERANCE)


def test_evicted_tokens_cannot_be_restored() -> None:
    cache = runtime(sliding_window_cache=True).new_cache(1, 60)
    runtime(sliding_window_cache=True).step(ids_of(3 * W), cache, num_logits=1)
    with pytest.raises(
        InputError, match=rf"no longer hold what a cut to {W} .*sliding_window_cache=False"
    ):
        cache.truncate(0, W)
    assert cache.lengths.tolist() == [3 * W]
    cache.truncate(0, 0)
    again = runtime(sliding_window_cache=False).new_cache(1, 60)
    for windowed, each in ((True, cache), (False, again)):
        runtime(sliding_window_cache=windowed).step(ids_of(W + 2, seed=3), each, num_logits=1)
    assert_same(cache, again)


def test_drafts_change_nothing() -> None:
    prompt = np.tile(ids_of(5), 6)[0]
    pairs = functools.partial(PromptLookup, min_ngram=2)
    texts = [
        generate(
            runtime(sliding_window_cache=windowed),
            [prompt],
            SamplingParams(temperature=0.7, seed=5),
            max_new_tokens=40,
            stop_token_ids=(),
            drafter=drafter,
            max_draft_tokens=W,
        ).collect()[0]
        for windowed, drafter in ((False, None), (True, None), (True, pairs))
    ]
    assert texts[2].drafted_tokens > 0
    assert texts[0].token_ids == texts[1].token_ids == texts[2].token_ids


class RightAtFirst:
    """A drafter that is right for ``known`` tokens, which earns it long drafts, and then wrong."""

    token_cost = 0.0

    def __init__(self, text: Sequence[int], known: int) -> None:
        self.text, self.known = list(text), known

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        end = len(tokens) + max_tokens
        wrong = [(token + 1) % TINY.vocab_size for token in self.text]
        return (self.text[: self.known] + wrong[self.known :])[len(tokens) : end]


@pytest.mark.parametrize("length", range(2 * W, 3 * W + 1))
def test_no_draft_is_longer_than_what_can_be_cut_off(length: int) -> None:
    def answer(drafter: Callable[[], Drafter] | None) -> Completion:
        return generate(
            runtime(sliding_window_cache=True),
            [ids_of(length)[0]],
            SamplingParams(),
            max_new_tokens=30,
            stop_token_ids=(),
            drafter=drafter,
            max_draft_tokens=5 * W,
        ).collect()[0]

    right = answer(None)
    text = [*ids_of(length)[0].tolist(), *right.token_ids]
    drafted = answer(lambda: RightAtFirst(text, length + 5))
    assert 0 < drafted.accepted_tokens < drafted.drafted_tokens
    assert drafted.token_ids == right.token_ids


def test_verify_proves_both_graphs() -> None:
    options = VerifyOptions(decode_steps=2 * W + 4, greedy_steps=6)
    report = verify(runtime(sliding_window_cache=True), source_of(), options=options)
    assert report.passed, report.to_json()
    names = {case.name for case in report.cases}
    assert {"decode", "full-decode", "full-chunked", "full-ragged-batch", "full-padded"} <= names
    report = verify(runtime(sliding_window_cache=False), source_of(), options=options)
    assert {"windowed-decode", "windowed-chunked"} <= {case.name for case in report.cases}
    assert report.passed, report.to_json()


def test_verify_detects_a_cache_that_evicts_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    held = SlidingWindowCache.first_held
    monkeypatch.setattr(
        SlidingWindowCache, "first_held", lambda cache, length: min(length, held(cache, length) + W)
    )
    options = VerifyOptions(decode_steps=2 * W + 4, greedy_steps=6)
    report = verify(runtime(sliding_window_cache=True), source_of(), options=options)
    assert not report.passed


def test_the_bundle_lists_both_graphs_over_one_weights_file() -> None:
    bundle = Bundle(exported_bundle("ort"))
    (graph,) = bundle.manifest.graphs
    assert graph.windowed_path == "onnx/model_windowed.onnx"
    assert {name for name in bundle.manifest.files if name.startswith("onnx/")} == {
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/model_windowed.onnx",
    }


@pytest.mark.parametrize(
    ("bundle", "problem"),
    [
        (("portable", "irregular"), "the bundle has no graph for them"),
        (("ort", "all full, one kv head, untied"), "the bundle has no graph for them"),
    ],
)
def test_a_missing_sliding_window_graph_is_rejected(bundle: tuple[str, str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        OnnxRuntime(exported_bundle(*bundle), device="cpu", sliding_window_cache=True)
    assert not OnnxRuntime(exported_bundle(*bundle), device="cpu").uses_sliding_window_cache


def test_an_older_onnxruntime_runs_the_full_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.30.2")
    with pytest.raises(InputError, match=r"they need onnxruntime 1\.31 and this is 1\.30\.2"):
        OnnxRuntime(exported_bundle("ort"), device="cpu", sliding_window_cache=True)
    assert not OnnxRuntime(exported_bundle("ort"), device="cpu").uses_sliding_window_cache


def test_an_older_bundle_has_no_sliding_window_graph(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import shutil

    shutil.copytree(exported_bundle("ort"), tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    del manifest["graphs"][0]["windowed_path"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    assert not OnnxRuntime(tmp_path / "old", device="cpu").uses_sliding_window_cache
