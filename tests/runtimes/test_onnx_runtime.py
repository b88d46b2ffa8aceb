"""The ONNX runtime against the reference, step by step, and the graph without this package."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import Bundle, Signature, write_manifest
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import NO_LOGITS, IntArray, KVCache, Logits, Runtime
from tests.support.exported_bundles import TARGETS, edit_json, exported_bundle, source_of
from tests.support.tiny_models import TINY

TOLERANCE = 1e-5  # absolute; logits are about 1, and two correct float32 runs differ by 1e-6
W = TINY.sliding_window
REPOSITORY = Path(__file__).parents[2]
EXPORTS = [
    ("ort", "irregular"),
    ("portable", "irregular"),
    ("ort", "one sliding layer, many tokens"),
    ("portable", "all full, one kv head, untied"),
]
CHUNKS = {
    "at once": [2 * W + 3],
    "token by token": [1] * (2 * W + 3),
    "prefill, then cross the window token by token": [W - 1, *[1] * (W + 2)],
    "chunks across the window": [W - 2, 4, W + 1, 1, 3],
    "the window exactly, then a chunk": [W, 5, 1],
    "one past the window": [W + 1, 1],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Open with one thread: for tiny models, handing work to others costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def onnx_runtime(target: str, variant: str = "irregular") -> OnnxRuntime:
    return OnnxRuntime(exported_bundle(target, variant), device="cpu", threads=1)


@functools.cache
def reference_runtime(variant: str = "irregular") -> ReferenceRuntime:
    return ReferenceRuntime(load_reference(source_of(variant)))


def random_ids(rows: int, length: int, seed: int = 2) -> IntArray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length))


def run_chunks(
    runtime: Runtime, cache: KVCache, ids: IntArray, chunks: list[int], row: int = 0
) -> Logits:
    parts = np.split(ids, np.cumsum(chunks)[:-1], axis=1)
    steps = [runtime.step(part, cache, num_logits=0, row=row) for part in parts]
    return np.concatenate(steps, axis=1)


def assert_same_cache(ours: KVCache, expected: KVCache) -> None:
    assert ours.lengths.tolist() == expected.lengths.tolist()
    for row in range(expected.batch_size):
        for our_pair, expected_pair in zip(ours.read(row), expected.read(row), strict=True):
            for our, wanted in zip(our_pair, expected_pair, strict=True):
                np.testing.assert_allclose(our, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("export", EXPORTS, ids=", ".join)
def test_steps_equal_those_of_the_reference(
    export: tuple[str, str], rows: int, chunks: list[int]
) -> None:
    runtime, expected = onnx_runtime(*export), reference_runtime(export[1])
    ids = random_ids(rows, sum(chunks))
    cache, expected_cache = (r.new_cache(rows, sum(chunks)) for r in (runtime, expected))
    logits = run_chunks(runtime, cache, ids, chunks)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(
        logits, run_chunks(expected, expected_cache, ids, chunks), rtol=0, atol=TOLERANCE
    )
    assert_same_cache(cache, expected_cache)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_different_length_equal_each_row_alone(target: str) -> None:
    runtime, expected = onnx_runtime(target), reference_runtime()
    lengths, together = (2, W, 2 * W + 1), 5
    rows = [random_ids(1, length + together + 3, seed) for seed, length in enumerate(lengths)]
    cache = runtime.new_cache(3, 40)
    for row, length in enumerate(lengths):
        prompt = rows[row][:, :length]
        run_chunks(runtime, cache, prompt, [1, length - 1], row=row)
    logits = []
    for step in range(together):
        ids = [ids[:, length + step] for ids, length in zip(rows, lengths, strict=True)]
        logits.append(runtime.step(np.array(ids), cache, num_logits=1))
    ends = [slice(length + together, length + together + 3) for length in lengths]
    chunk = np.concatenate([ids[:, end] for ids, end in zip(rows, ends, strict=True)])
    logits.append(runtime.step(chunk[:, :2], cache, num_logits=0))
    logits.append(
        np.concatenate(
            [
                runtime.step(chunk[row : row + 1, 2:], cache, num_logits=1, row=row)
                for row in range(3)
            ]
        )
    )
    found = np.concatenate(logits, axis=1)
    for row, length in enumerate(lengths):
        alone = expected.new_cache(1, 40)
        wanted = expected.step(rows[row], alone, num_logits=0)
        np.testing.assert_allclose(found[row], wanted[0, length:], rtol=0, atol=TOLERANCE)
        for our_pair, pair in zip(cache.read(row), alone.read(0), strict=True):
            np.testing.assert_allclose(our_pair, pair, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 3])
def test_num_logits_keeps_the_last_ones(target: str, count: int) -> None:
    runtime, ids = onnx_runtime(target), random_ids(2, 9)
    everything = runtime.step(ids, runtime.new_cache(2, 9), num_logits=0)
    kept = runtime.step(ids, runtime.new_cache(2, 9), num_logits=count)
    assert kept.shape == (2, count, TINY.vocab_size)
    np.testing.assert_allclose(kept, everything[:, -count:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_without_logits_fills_the_cache_all_the_same(target: str, rows: int) -> None:
    runtime, ids = onnx_runtime(target), random_ids(rows, 9)
    caches = [runtime.new_cache(rows, 9) for _ in range(2)]
    runtime.step(ids[:, :5], caches[0], num_logits=1)
    none = runtime.step(ids[:, :5], caches[1], num_logits=NO_LOGITS)
    assert none.shape == (rows, 0, TINY.vocab_size)
    after, also_after = (runtime.step(ids[:, 5:], cache, num_logits=0) for cache in caches)
    np.testing.assert_array_equal(also_after, after)


@pytest.mark.parametrize("is_old", [False, True])
def test_graphs_of_older_bundles_are_never_asked_for_no_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    shutil.copytree(exported_bundle("ort"), tmp_path / "bundle")
    path = tmp_path / "bundle" / "manifest.json"
    (graph,) = json.loads(path.read_text())["graphs"]
    if is_old:
        del graph["takes_no_logits"]
    edit_json(path, graphs=[graph])
    runtime = OnnxRuntime(tmp_path / "bundle", device="cpu", threads=1)
    asked: list[int] = []
    value = OnnxRuntime._num_logits_value

    def recorded(self: OnnxRuntime, count: int) -> Any:
        asked.append(count)
        return value(self, count)

    monkeypatch.setattr(OnnxRuntime, "_num_logits_value", recorded)
    none = runtime.step(random_ids(1, 5), runtime.new_cache(1, 8), num_logits=NO_LOGITS)
    assert none.shape == (1, 0, TINY.vocab_size)
    assert asked == [1 if is_old else -5]


@pytest.mark.parametrize("target", TARGETS)
def test_logits_and_cache_of_earlier_steps_stay_as_they_were(target: str) -> None:
    runtime, ids = onnx_runtime(target), random_ids(1, 8)
    cache = runtime.new_cache(1, 8)
    first = runtime.step(ids[:, :7], cache, num_logits=1)
    kept, read = first.copy(), cache.read(0)
    copies = [(key.copy(), value.copy()) for key, value in read]
    runtime.step(ids[:, 7:], cache, num_logits=1)
    assert np.array_equal(first, kept)
    for pair, copied in zip(read, copies, strict=True):
        assert np.array_equal(pair[0], copied[0])
        assert np.array_equal(pair[1], copied[1])


@pytest.mark.parametrize("target", TARGETS)
def test_two_caches_do_not_disturb_each_other(target: str) -> None:
    runtime, ids = onnx_runtime(target), random_ids(2, 10)
    alone = [
        run_chunks(runtime, runtime.new_cache(1, 10), ids[row : row + 1], [4, 1, 1, 4])
        for row in range(2)
    ]
    caches = [runtime.new_cache(1, 10) for _ in range(2)]
    parts: list[list[Logits]] = [[], []]
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 10)):
        for row in range(2):
            part = ids[row : row + 1, start:stop]
            parts[row].append(runtime.step(part, caches[row], num_logits=0))
    for row in range(2):
        np.testing.assert_array_equal(np.concatenate(parts[row], axis=1), alone[row])


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_that_does_not_fit_is_rejected_and_changes_nothing(target: str) -> None:
    runtime, ids = onnx_runtime(target), random_ids(1, 10)
    cache = runtime.new_cache(1, 6)
    runtime.step(ids[:, :5], cache, num_logits=1)
    before = cache.read(0)
    with pytest.raises(InputError, match="holds 5 of 6 tokens and has no room for 2 more"):
        runtime.step(ids[:, 5:7], cache, num_logits=1)
    assert cache.lengths.tolist() == [5]
    np.testing.assert_array_equal(cache.read(0)[0][0], before[0][0])
    runtime.step(ids[:, 5:6], cache, num_logits=1)  # the last position can be used
    with pytest.raises(InputError, match="no room"):
        runtime.step(ids[:, 6:7], cache, num_logits=1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rows", "capacity"), [(0, 8), (1, 0), (1, 257)])
def test_invalid_cache_sizes_are_rejected(target: str, rows: int, capacity: int) -> None:
    with pytest.raises(InputError, match=r"batch_size|context is 1 to 256"):
        onnx_runtime(target).new_cache(rows, capacity)


@pytest.mark.parametrize("target", TARGETS)
def test_the_runtime_reports_what_it_uses(target: str) -> None:
    found = onnx_runtime(target).info.to_json()
    assert found["target"] == target
    assert found["providers"] == ["CPUExecutionProvider"]
    assert found["onnxruntime"] == ort.__version__
    assert list(found) == [
        *("runtime", "onnxruntime", "target", "cache", "dtype", "residual", "computed_in"),
        *("device", "providers", "threads"),
    ]


# --- the graph without this package -----------------------------------------------------------


def raw_session(target: str) -> ort.InferenceSession:
    path = exported_bundle(target) / "onnx" / "model.onnx"
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def empty_past(rows: int) -> dict[str, np.ndarray]:
    shape = (rows, TINY.num_key_value_heads, 0, TINY.head_dim)
    return {spec.name: np.zeros(shape, np.float32) for spec in Signature.of(TINY).past}


def expected_logits(ids: IntArray) -> Logits:
    runtime = reference_runtime()
    return runtime.step(ids, runtime.new_cache(len(ids), ids.shape[1]), num_logits=0)


@pytest.mark.parametrize("target", TARGETS)
def test_other_consumers_start_empty_and_feed_present_back_in_order(target: str) -> None:
    """Feed all inputs but the optional one, and past from present, as optimum does."""
    session, ids = raw_session(target), random_ids(1, 12)
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    assert names == [spec.name for spec in Signature.of(TINY).inputs if not spec.optional]
    assert [v.name for v in session.get_overridable_initializers()] == ["num_logits_to_keep"]
    past, logits = empty_past(1), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12)):
        feeds = {
            "input_ids": ids[:, start:stop],
            "attention_mask": np.ones((1, stop), np.int64),
            **past,
        }
        found, *present = session.run(outputs, feeds)
        logits.append(found)
        past = dict(zip(names[2:], present, strict=True))
    np.testing.assert_allclose(
        np.concatenate(logits, axis=1), expected_logits(ids), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("target", TARGETS)
def test_other_consumers_may_request_fewer_logits(target: str) -> None:
    ids = random_ids(2, 9)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "num_logits_to_keep": np.array([2]),
        **empty_past(2),
    }
    (logits,) = raw_session(target).run(["logits"], feeds)
    np.testing.assert_allclose(logits, expected_logits(ids)[:, -2:], rtol=0, atol=TOLERANCE)


# --- invalid bundles and requests ------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_bundle("ort"), tmp_path / "copy"))


def test_truncated_weights_are_found_before_they_are_used(copied: Path) -> None:
    data = copied / "onnx" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"onnx/model\.onnx_data: \d+ bytes instead of \d+"):
        OnnxRuntime(copied)
    data.unlink()
    with pytest.raises(InputError, match=r"onnx/model\.onnx_data: missing"):
        OnnxRuntime(copied)


def test_a_tampered_graph_is_found_by_its_hash(copied: Path) -> None:
    graph = copied / "onnx" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(InputError, match=r"onnx/model\.onnx: SHA-256 differs"):
        OnnxRuntime(copied)


def test_a_swapped_graph_is_found_by_its_interface(copied: Path) -> None:
    other = exported_bundle("ort", "one sliding layer, many tokens")
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copy(other / "onnx" / name, copied / "onnx" / name)
    with pytest.raises(InputError, match="differs from its manifest"):
        OnnxRuntime(copied)
    write_manifest(copied, Bundle(copied).manifest, {})
    with pytest.raises(
        Gemma3ExportError, match=r"past_key_values\.1\.key.*export the bundle again"
    ):
        OnnxRuntime(copied)


def test_a_file_that_is_not_a_graph_is_rejected(copied: Path) -> None:
    (copied / "onnx" / "model.onnx").write_bytes(b"not a graph")
    write_manifest(copied, Bundle(copied).manifest, {})
    with pytest.raises(InputError, match=r"cannot load .*export the bundle again"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cpu:0", "", "CUDA"])
def test_unknown_devices_are_rejected(device: str) -> None:
    with pytest.raises(InputError, match="choose auto, cpu, cuda or cuda:N"):
        OnnxRuntime(exported_bundle("ort"), device=device)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA is available"
)
@pytest.mark.parametrize("runtime", ["onnx", "reference"])
def test_a_missing_gpu_is_reported_with_the_remedy(runtime: str) -> None:
    with pytest.raises(UnavailableError, match="--device cpu"):
        open_runtime(exported_bundle("ort"), runtime, device="cuda")


@pytest.mark.parametrize("threads", [0, -1])
def test_invalid_thread_counts_are_rejected(threads: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        OnnxRuntime(exported_bundle("ort"), threads=threads)


@pytest.mark.parametrize("target", TARGETS)
def test_running_a_graph_does_not_import_torch(target: str) -> None:
    program = """
import sys
from collections.abc import Iterator
from pathlib import Path
import numpy as np
from gemma3_export.api.opening import open_runtime
import gemma3_export.runtimes.generation.loop, gemma3_export.tokenizer.tokenizer
runtime = open_runtime(Path(sys.argv[1]), "onnx", device="cpu")
cache = runtime.new_cache(2, 9)
for ids in (np.ones((2, 3), np.int64), np.ones((2, 1), np.int64)):
    assert np.isfinite(runtime.step(ids, cache, num_logits=1)).all()
cache.read(0)
heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "gguf"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported_bundle(target))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- graphs that do not match the config ---------------------------------------------------------


def edit_config(bundle: Path, **changes: object) -> None:
    """Change ``config.json`` together with its record in the manifest."""
    edit_json(bundle / "config.json", **changes)
    write_manifest(bundle, Bundle(bundle).manifest, {})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vocab_size": 96}, r"logits is \[.*97\], declared as \[.*96\]"),
        ({"head_dim": 32}, r"past_key_values\.0\.key is .*16\], declared as .*32\]"),
        ({"num_key_value_heads": 3}, r"past_key_values\.0\.key .*, 2, .*, 3, .*and 18 more"),
    ],
    ids=str,
)
@pytest.mark.parametrize("windowed", [True, False])
def test_an_edited_config_with_a_matching_hash_is_rejected_when_opened(
    copied: Path, changes: dict[str, object], complaint: str, windowed: bool
) -> None:
    edit_config(copied, **changes)
    with pytest.raises(InputError, match=complaint):
        OnnxRuntime(copied, sliding_window_cache=windowed)


def test_the_type_of_the_cache_must_be_the_declared_one(copied: Path) -> None:
    graphs = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["graphs"]
    edit_json(copied / "manifest.json", graphs=[graphs[0] | {"cache_dtype": "float16"}])
    with pytest.raises(InputError, match=r"is tensor\(float\), declared as tensor\(float16\)"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("windowed", [True, False])
def test_the_full_and_the_sliding_window_graph_cannot_be_swapped(
    copied: Path, windowed: bool
) -> None:
    names = ["model.onnx", "model_windowed.onnx"]
    wrong, right = names if windowed else reversed(names)
    shutil.copy(copied / "onnx" / wrong, copied / "onnx" / right)
    write_manifest(copied, Bundle(copied).manifest, {})
    with pytest.raises(InputError, match=rf"{right} does not have .*window_capacity"):
        OnnxRuntime(copied, sliding_window_cache=windowed)


def test_windows_as_long_as_the_context_need_no_sliding_window_cache(copied: Path) -> None:
    edit_config(copied, sliding_window=2**31 - 1)
    runtime = OnnxRuntime(copied, device="cpu", threads=1)
    assert not runtime.uses_sliding_window_cache
    runtime.step(random_ids(1, 3), runtime.new_cache(1, 3), num_logits=1)
    with pytest.raises(InputError, match="as long as the context of 256"):
        OnnxRuntime(copied, sliding_window_cache=True)


def test_a_cache_that_does_not_fit_into_memory_is_a_clear_error(copied: Path) -> None:
    edit_config(copied, max_position_embeddings=2**31 - 1)
    runtime = OnnxRuntime(copied, device="cpu", threads=1, sliding_window_cache=False)
    with pytest.raises(Gemma3ExportError, match=r"needs about .* GB.*fewer"):
        runtime.new_cache(2**20, 2**30)


@pytest.mark.parametrize(
    ("shape", "arguments", "complaint"),
    [
        ((2, 0), {"num_logits": 0}, "a step of 0 tokens"),
        ((1, 0), {"num_logits": 0, "row": 1}, "a step of 0 tokens"),
        ((1, 3), {"num_logits": 1, "row": 2}, "row 2 .* the cache has 2"),
        ((1, 3), {"num_logits": 1, "row": -1}, "row -1 .* the cache has 2"),
        ((2, 3), {"num_logits": -2}, "num_logits is -2"),
        ((2, 3), {"num_logits": 4}, "num_logits is 4; a step of 3 tokens"),
        ((0, 3), {"num_logits": 1}, r"shape \[0, 3\]; a step takes \[R, T\]"),
        ((3, 3), {"num_logits": 1}, "row 2 .* the cache has 2"),
        ((2, 3), {"num_logits": 1, "row": 1}, "row 2 .* the cache has 2"),
        ((3,), {"num_logits": 1}, r"shape \[3\]"),
    ],
)
@pytest.mark.parametrize("backend", ["ort", "portable", "reference"])
def test_invalid_steps_are_rejected_with_the_same_message(
    backend: str, shape: tuple[int, ...], arguments: dict[str, int], complaint: str
) -> None:
    runtime: Runtime = reference_runtime() if backend == "reference" else onnx_runtime(backend)
    cache = runtime.new_cache(2, 8)
    with pytest.raises(InputError, match=complaint):
        runtime.step(np.zeros(shape, np.int64), cache, **arguments)
    assert cache.lengths.tolist() == [0, 0]


def test_onnxruntime_collects_nothing_and_says_nothing_where_home_is_read_only() -> None:
    code = (
        "import os; from gemma3_export.runtimes.onnx import session; session.import_onnxruntime()\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    for given, found in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        environment = os.environ | {"HOME": "/dev/null/home"} | given
        environment.pop("XDG_CACHE_HOME", None)
        if not given:
            environment.pop("ORT_DISABLE_TELEMETRY", None)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == found
        assert not done.stderr or given
