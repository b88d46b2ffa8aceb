"""The contract of all key-value caches: tokens that are cut off leave no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma3_export.errors import InputError
from gemma3_export.parity.transformers_runtime import TransformersRuntime
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import KVCache, Logits, Runtime
from tests.support.exported_bundles import exported_bundle, source_of
from tests.support.tiny_models import TINY

TOLERANCE = 1e-5  # absolute; logits are about 1, and two correct float32 runs differ by 1e-6
W = TINY.sliding_window


@pytest.fixture(scope="module", params=["reference", "ort", "portable", "transformers"])
def runtime(request: pytest.FixtureRequest, tiny_folder: Path) -> Runtime:
    if request.param == "reference":
        return ReferenceRuntime(load_reference(source_of()))
    if request.param == "transformers":
        return TransformersRuntime(tiny_folder)
    return OnnxRuntime(
        exported_bundle(request.param), device="cpu", threads=1, sliding_window_cache=False
    )


def random_ids(rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length))


def assert_row_equals(cache: KVCache, row: int, ids: np.ndarray, runtime: Runtime) -> Logits:
    """Check that the row holds what ``ids`` alone give, and return their logits [T, V]."""
    alone = runtime.new_cache(1, 64)
    logits = runtime.step(ids[None], alone, num_logits=0)
    assert cache.lengths[row] == ids.size
    for ours, expected in zip(cache.read(row), alone.read(0), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    return logits[0]


@pytest.mark.parametrize(("fed", "kept"), [(W + 9, W + 8), (W + 9, W), (9, 1), (9, 0), (9, 9)])
def test_a_step_after_a_cut_follows_what_was_kept(runtime: Runtime, fed: int, kept: int) -> None:
    ids = random_ids(1, fed, seed=1)
    cache = runtime.new_cache(1, 64)
    runtime.step(ids, cache, num_logits=1)
    cache.truncate(0, kept)
    other = random_ids(1, 5, seed=2)
    logits = [runtime.step(part, cache, num_logits=0) for part in (other[:, :4], other[:, 4:])]
    expected = assert_row_equals(cache, 0, np.append(ids[0, :kept], other[0]), runtime)
    found = np.concatenate(logits, axis=1)[0]
    np.testing.assert_allclose(found, expected[kept:], rtol=0, atol=TOLERANCE)


def test_rows_are_cut_and_continued_alone_and_together(runtime: Runtime) -> None:
    """Random steps and cuts of three rows, each checked against its own history."""
    for seed in range(3):
        generator = np.random.default_rng(seed)
        cache = runtime.new_cache(3, 64)
        histories = [np.zeros(0, np.int64)] * 3
        for _ in range(14):
            row = int(generator.integers(3))
            action = generator.integers(3)
            if action == 0:
                kept = int(generator.integers(histories[row].size + 1))
                cache.truncate(row, kept)
                histories[row] = histories[row][:kept]
            elif action == 1:
                ids = generator.integers(0, TINY.vocab_size, (1, generator.integers(1, 5)))
                runtime.step(ids, cache, num_logits=1, row=row)
                histories[row] = np.append(histories[row], ids[0])
            else:
                ids = generator.integers(0, TINY.vocab_size, (3, 1))
                logits = runtime.step(ids, cache, num_logits=1)
                histories = [np.append(*pair) for pair in zip(histories, ids, strict=True)]
                for index, history in enumerate(histories):
                    expected = assert_row_equals(cache, index, history, runtime)
                    found = logits[index, -1]
                    np.testing.assert_allclose(found, expected[-1], rtol=0, atol=TOLERANCE)
        assert cache.lengths.tolist() == [history.size for history in histories]


def test_truncating_a_full_row_makes_room(runtime: Runtime) -> None:
    ids = random_ids(1, 8, seed=3)
    cache = runtime.new_cache(1, 8)
    runtime.step(ids, cache, num_logits=1)
    for _ in range(3):
        cache.truncate(0, 5)
        runtime.step(ids[:, 5:], cache, num_logits=1)
    assert_row_equals(cache, 0, ids[0], runtime)


@pytest.mark.parametrize("length", [-1, 5])
def test_truncating_to_more_than_the_row_holds_is_rejected(runtime: Runtime, length: int) -> None:
    cache = runtime.new_cache(2, 8)
    runtime.step(random_ids(1, 4, seed=4), cache, num_logits=1, row=1)
    with pytest.raises(InputError, match=f"row 1 holds 4 tokens; it cannot be cut to {length}"):
        cache.truncate(1, length)
    assert cache.lengths.tolist() == [0, 4]


def test_no_row_grows_past_the_context_of_the_model(runtime: Runtime) -> None:
    limit = TINY.max_position_embeddings
    with pytest.raises(
        InputError, match=f"cache of {limit + 1} tokens; .* context is 1 to {limit}"
    ):
        runtime.new_cache(1, limit + 1)
    cache = runtime.new_cache(1, limit)
    runtime.step(random_ids(1, limit, seed=5), cache, num_logits=1)
    with pytest.raises(InputError, match=f"holds {limit} of {limit} tokens and has no room for 1"):
        runtime.step(random_ids(1, 1, seed=6), cache, num_logits=1)
