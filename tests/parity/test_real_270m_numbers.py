"""The published numbers of the real Gemma 3 270M, against a float64 run of the reference.

The reference's own float32 error is the noise floor; equivalent implementations stay close to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource, open_weights
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import IntArray, KVCache, Runtime
from tests.support.tokenizer_corpus import TEXTS
from tests.support.transformers_peer import transformers_peer

pytestmark = [pytest.mark.real_weights, pytest.mark.slow]
LENGTH = 1100  # the window is 512
KEPT = 64  # last positions whose logits are compared
DECODE_FROM = 480  # 64 single-token steps from here cross the window
WINDOW = 512
PEER_FACTOR = 1.5
NOISE_FACTOR = 3.0  # allows for other summation orders
Array = NDArray[Any]
Measured = tuple[Array, list[Array]]  # logits, and every key and value


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(real_gguf: Path) -> Iterator[WeightSource]:
    with open_weights(str(real_gguf), size="270m") as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(real_gguf: Path) -> IntArray:
    """Token ids [1, T] of real text in many scripts."""
    from gemma3_export.tokenizer import load_tokenizer

    tokens = load_tokenizer(real_gguf).encode("\n".join(TEXTS))
    return np.resize(np.array(tokens, np.int64), (1, LENGTH))


def measured(logits: Array, cache: KVCache) -> Measured:
    return logits[0, -KEPT:], [tensor for pair in cache.read(0) for tensor in pair]


def prefill(runtime: Runtime, ids: IntArray) -> Measured:
    cache = runtime.new_cache(1, ids.shape[1])
    return measured(runtime.step(ids, cache, num_logits=KEPT), cache)


def chunked(runtime: Runtime, ids: IntArray) -> Measured:
    """Run chunks: the last is longer than the compared part, and none ends at the window."""
    cache = runtime.new_cache(1, ids.shape[1])
    for part in np.split(ids, [300, 700, 1000], axis=1):
        logits = runtime.step(part, cache, num_logits=min(KEPT, part.shape[1]))
    return measured(logits, cache)


def decoded(runtime: Runtime, ids: IntArray) -> Measured:
    cache = runtime.new_cache(1, DECODE_FROM + KEPT)
    runtime.step(ids[:, :DECODE_FROM], cache, num_logits=1)
    steps = [
        runtime.step(ids[:, position : position + 1], cache, num_logits=1)
        for position in range(DECODE_FROM, DECODE_FROM + KEPT)
    ]
    return measured(np.concatenate(steps, axis=1), cache)


@pytest.fixture(scope="module")
def expected(source: WeightSource, ids: IntArray) -> dict[str, Measured]:
    runtime = ReferenceRuntime(load_reference(source, torch.float64))
    whole, short = prefill(runtime, ids), prefill(runtime, ids[:, : DECODE_FROM + KEPT])
    return {"prefill": whole, "chunked": whole, "decoded": short}


RUNS = {"prefill": prefill, "chunked": chunked, "decoded": decoded}


@pytest.fixture(scope="module")
def noise_floor(
    source: WeightSource, ids: IntArray, expected: dict[str, Measured]
) -> dict[str, list[float]]:
    """The errors of the float32 reference by run: logits, then every key and value."""
    runtime = ReferenceRuntime(load_reference(source))
    return {name: errors(run(runtime, ids), expected[name]) for name, run in RUNS.items()}


def errors(found: Measured, expected: Measured) -> list[float]:
    """Return the root mean square errors of the logits and of every cached tensor.

    A sliding-window cache holds the last tokens only; they are compared with the expected end.
    """
    pairs = [(found[0], expected[0])]
    for one, true in zip(found[1], expected[1], strict=True):
        pairs.append((one, true[:, true.shape[1] - one.shape[1] :]))
    return [float(np.sqrt(np.mean((one - true) ** 2))) for one, true in pairs]


def assert_within(found: list[float], noise_floor: list[float], factor: float) -> None:
    for index, (error, limit) in enumerate(zip(found, noise_floor, strict=True)):
        where = "logits" if index == 0 else f"cached tensor {index - 1}"
        assert error <= factor * limit + 1e-9, f"{where}: {error:.3g} > {factor} x {limit:.3g}"


def test_the_reference_is_as_exact_as_transformers(
    source: WeightSource,
    ids: IntArray,
    expected: dict[str, Measured],
    noise_floor: dict[str, list[float]],
) -> None:
    transformers = pytest.importorskip("transformers")
    weights = {name: source.read(name) for name, _ in source.config.weight_shapes()}
    model = transformers_peer(source.config, weights)
    cache = transformers.DynamicCache()  # without a config, it also keeps tokens outside the window
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids), past_key_values=cache, logits_to_keep=KEPT).logits
    tensors = [t[0].numpy() for layer in cache.layers for t in (layer.keys, layer.values)]
    theirs = errors((logits[0].numpy(), tensors), expected["prefill"])
    print(
        f"float32 error of the logits: ours {noise_floor['prefill'][0]:.3g}, theirs {theirs[0]:.3g}"
    )
    assert theirs[0] < 1e-3, "transformers computes a different function"
    assert_within(noise_floor["prefill"], theirs, PEER_FACTOR)


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_graphs_equal_the_reference_at_prefill_chunks_and_cached_steps(
    target: str,
    source: WeightSource,
    ids: IntArray,
    expected: dict[str, Measured],
    noise_floor: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    bundle = export_bundle(source, tmp_path / target, OnnxWriter(target=target)).path
    for windowed in (False, True) if target == "ort" else (False,):
        runtime = OnnxRuntime(bundle, device="cpu", sliding_window_cache=windowed)
        for name, run in RUNS.items():
            seen = run(runtime, ids)
            least = WINDOW if windowed else expected[name][1][0].shape[1]
            assert min(tensor.shape[1] for tensor in seen[1]) >= least
            found = errors(seen, expected[name])
            kind = "windowed" if windowed else target
            print(
                f"{kind} {name}: error of the logits {found[0]:.3g}, "
                f"noise floor {noise_floor[name][0]:.3g}"
            )
            assert_within(found, noise_floor[name], NOISE_FACTOR)
