"""The graphs for prompts of a quantized export, and the runtime that uses them."""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.bundle.inspection import inspect_bundle
from gemma3_export.bundle.terminal import bundle_lines
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.parity import ParityReport, VerifyOptions, verify
from gemma3_export.parity.graph_variants import run_variant
from gemma3_export.parity.ground_truth import GroundTruth
from gemma3_export.parity.judge import Limits
from gemma3_export.parity.prefill_check import PrefillCheck
from gemma3_export.processor_kind import parse_cpuinfo
from gemma3_export.progress import ignore_progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.onnx import prefill
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import IntArray, PrefillProducts
from tests.support.exported_bundles import accept_changes, exported
from tests.support.tiny_models import tiny_config

CONFIG = tiny_config(
    num_hidden_layers=3, layer_types=("sliding_attention", "full_attention", "sliding_attention")
)
SEED = 5
WRITER = OnnxWriter(dtype="int8", block_size=16, prefill_graph=True)
OPTIONS = VerifyOptions(decode_steps=8, greedy_steps=4, min_top1=0.85, locate=False)
DATA = "onnx/model_quantized_prefill.onnx_data"
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 70))


@functools.cache
def bundle() -> Bundle:
    return Bundle(exported(WRITER, CONFIG, SEED))


@functools.cache
def runtime(products: PrefillProducts, is_windowed: bool = True) -> OnnxRuntime:
    return OnnxRuntime(
        bundle(), device="cpu", threads=1, sliding_window_cache=is_windowed, prefill=products
    )


def copied(path: Path) -> Path:
    return Path(shutil.copytree(bundle().path, path / "bundle"))


def run(
    model: OnnxRuntime | ReferenceRuntime, ids: IntArray, *chunks: int, rows: int = 1, row: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Feed chunks of ids [1, T] to a row; return the logits of each, and keys and values."""
    cache = model.new_cache(rows, 80)
    logits, start = [], 0
    for count in chunks:
        logits.append(model.step(ids[:, start : start + count], cache, num_logits=1, row=row))
        start += count
    return logits, [tensor for pair in cache.read(row) for tensor in pair]


def check(path: Path) -> ParityReport:
    found = Bundle(path)
    candidate = OnnxRuntime(found, device="cpu", threads=1, prefill="blocks")
    return verify(
        candidate,
        open_bundle_weights(found, "onnx"),
        options=OPTIONS,
        full_source=RandomSource(CONFIG, SEED),
    )


def test_parity_compares_prompts_with_a_reference_that_rounds_as_their_graph_does() -> None:
    report = check(bundle().path)
    assert report.passed
    cases = [case for case in report.cases if case.name.endswith("integers-prompts")]
    assert len(cases) == 2  # with either kind of cache
    assert all({layer.layer for layer in case.layers} == {0, 1, 2} for case in cases)
    metrics = {metric.name: metric.value for metric in report.gates[1].metrics}
    assert 0 < metrics["prefill_mean_kld"] < 0.01
    assert metrics["prefill_mean_kld"] != metrics["mean_kld"]


def change_rotation(graph: onnx.GraphProto) -> None:
    tensor = next(t for t in graph.initializer if t.name.startswith("prefill.hadamard"))
    matrix = onnx.numpy_helper.to_array(tensor).copy()
    matrix[:, 1] *= -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(matrix, tensor.name))


def widen_window(graph: onnx.GraphProto) -> None:
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    window = next(a for a in nodes[-1].attribute if a.name == "local_window_size")
    window.i += 1


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model_quantized_windowed_prefill.onnx", widen_window),
        ("model_quantized_prefill.onnx", change_rotation),
    ],
)
def test_parity_notices_a_graph_for_prompts_that_computes_something_else(
    tmp_path: Path, name: str, damage: Callable[[onnx.GraphProto], None]
) -> None:
    damaged = copied(tmp_path)
    file = damaged / "onnx" / name
    model = onnx.load(file, load_external_data=False)
    damage(model.graph)
    file.write_bytes(model.SerializeToString())
    accept_changes(damaged)
    found = Bundle(damaged)
    candidate = OnnxRuntime(
        found, device="cpu", threads=1, prefill="blocks", sliding_window_cache=True
    )
    source = open_bundle_weights(found, "onnx")
    truth = GroundTruth.for_runtime(candidate, source, options=OPTIONS)
    prompts = PrefillCheck(truth, Limits(factor=8, epsilon=1.2e-7))
    verdicts = {
        result.name: result.passed
        for variant in (prompts.variant(candidate), prompts.other_cache_variant(candidate))
        if variant is not None
        for result in run_variant(variant, ignore_progress)
    }
    is_windowed = damage is widen_window
    assert verdicts == {"integers-prompts": not is_windowed, "full-integers-prompts": is_windowed}


def test_parity_notices_damaged_weights_that_only_prompts_read(tmp_path: Path) -> None:
    damaged = copied(tmp_path)
    file = damaged / DATA
    content = np.fromfile(file, np.uint8)
    content[: content.size // 2] ^= 0x20
    content.tofile(file)
    accept_changes(damaged)
    report = check(damaged)
    metrics = {metric.name: metric.passed for metric in report.gates[1].metrics}
    assert not metrics.pop("prefill_mean_kld")
    assert all(metrics.values())


@pytest.mark.parametrize("is_windowed", [True, False])
@pytest.mark.parametrize("chunks", [(70,), (40, 30), (33, 5, 32)])
def test_prompts_cost_little_accuracy_in_any_chunks(
    is_windowed: bool, chunks: tuple[int, ...]
) -> None:
    exact = ReferenceRuntime(load_reference(RandomSource(CONFIG, SEED)))
    wanted_logits, wanted = run(exact, TOKENS[:1], *chunks)
    logits, found = run(runtime("integers", is_windowed), TOKENS[:1], *chunks)
    for expected, actual in zip([*wanted, *wanted_logits], [*found, *logits], strict=True):
        kept = expected[..., -actual.shape[-2] :, :]  # windows drop the oldest tokens
        assert 0 < np.linalg.norm(actual - kept) < 0.05 * np.linalg.norm(kept)


@pytest.mark.parametrize("is_windowed", [True, False])
def test_a_row_of_a_larger_cache_gets_the_same_bits(is_windowed: bool) -> None:
    model = runtime("integers", is_windowed)
    alone = run(model, TOKENS[:1], 40, 30)
    among_others = run(model, TOKENS[:1], 40, 30, rows=3, row=1)
    for expected, actual in zip(alone, among_others, strict=True):
        for one, other in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(one, other)


def test_short_steps_and_steps_that_want_all_logits_run_as_without_the_graph() -> None:
    blocks, integers = runtime("blocks"), runtime("integers")
    for count, num_logits in ((70, 0), (70, 70), (16, 1), (40, 30)):
        results = [
            model.step(TOKENS[:1, :count], model.new_cache(1, 80), num_logits=num_logits)
            for model in (blocks, integers)
        ]
        np.testing.assert_array_equal(*results)
    results = [run(model, TOKENS[:1], 17)[0][0] for model in (blocks, integers)]
    assert not np.array_equal(*results)


def test_a_step_that_evicted_tokens_can_be_taken_back() -> None:
    model = runtime("integers")
    cache = model.new_cache(1, 200)
    model.step(TOKENS[:1, :10], cache, num_logits=1)
    before = [tensor.copy() for pair in cache.read(0) for tensor in pair]
    model.step(TOKENS[:1, 10:14], cache, num_logits=1)
    cache.truncate(0, 10)
    after = [tensor for pair in cache.read(0) for tensor in pair]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_graph_has_neither_head_nor_products_that_no_cache_needs() -> None:
    for path in bundle().graph("onnx").prefill.paths:  # type: ignore[union-attr]
        graph = onnx.load(bundle().file(path), load_external_data=False).graph
        found = [node.op_type for node in graph.node]
        assert found.count("MatMulIntegerToFloat") == 4 * 2 + 1  # of the last layer, only q, k, v
        assert "MatMulNBits" not in found
        assert "logits" not in {value.name for value in graph.output}
        assert "num_logits_to_keep" not in {value.name for value in graph.input}
        stored = {entry.value for t in graph.initializer for entry in t.external_data[:1]}
        assert stored == {"model_quantized.onnx_data", "model_quantized_prefill.onnx_data"}


def test_onnxruntime_alone_runs_the_graph_on_several_rows() -> None:
    session = onnxruntime.InferenceSession(
        str(bundle().path / "onnx/model_quantized_prefill.onnx"),
        providers=["CPUExecutionProvider"],
    )
    empty = (CONFIG.num_key_value_heads, 0, CONFIG.head_dim)

    def present(ids: IntArray) -> list[np.ndarray]:
        past = {
            value.name: np.zeros((len(ids), *empty), np.float32)
            for value in session.get_inputs()[2:]
        }
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
        found: list[np.ndarray] = session.run(None, feeds)
        return found

    both = present(TOKENS)
    for row in range(2):
        for joint, alone in zip(both, present(TOKENS[row : row + 1]), strict=True):
            np.testing.assert_allclose(joint[row], alone[0], rtol=0, atol=1e-5)


def test_the_other_graphs_are_those_of_an_export_without_it() -> None:
    plain = exported(OnnxWriter(dtype="int8", block_size=16), CONFIG, SEED)
    for name in ("model_quantized.onnx", "model_quantized.onnx_data"):
        assert (plain / "onnx" / name).read_bytes() == (bundle().path / "onnx" / name).read_bytes()


def test_a_bundle_without_its_weights_for_prompts_is_rejected(tmp_path: Path) -> None:
    damaged = copied(tmp_path)
    (damaged / DATA).unlink()
    with pytest.raises(InputError, match=f"{DATA}: missing"):
        OnnxRuntime(damaged, device="cpu", threads=1)


def test_auto_uses_the_graph_on_x86_and_nothing_loads_it_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {}
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        found[machine] = OnnxRuntime(bundle(), device="cpu", threads=1).info
    assert found["x86_64"].prefills_with_integers
    assert found["x86_64"].to_json()["prefill"] == "integers"
    assert not found["aarch64"].prefills_with_integers
    assert not runtime("blocks").info.prefills_with_integers


@pytest.mark.parametrize(
    ("flags", "is_exact"),
    [("fpu avx2 avx512f", False), ("fpu avx2 avx512_vnni", True), ("avx_vnni avx2", True)],
)
def test_products_are_exact_on_processors_without_vnni_too(
    monkeypatch: pytest.MonkeyPatch, flags: str, is_exact: bool
) -> None:
    text = f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n"
    processor = parse_cpuinfo(text, otherwise="")
    monkeypatch.setattr(prefill, "read_processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert prefill.has_exact_products() is is_exact


def test_integers_that_cannot_be_had_are_rejected() -> None:
    plain = exported(OnnxWriter(dtype="int8", block_size=16), CONFIG, SEED)
    with pytest.raises(InputError, match="has no graph for prompts; export it with --prefill-gr"):
        OnnxRuntime(plain, device="cpu", threads=1, prefill="integers")
    for writer in ({"dtype": "fp32"}, {"dtype": "int8", "target": "web"}):
        with pytest.raises(InputError, match="--prefill-graph requires quantized matrices"):
            OnnxWriter(**writer, prefill_graph=True)
    with pytest.raises(InputError, match="float32 activations"):
        OnnxWriter(dtype="int8", activations="bf16", prefill_graph=True)


def test_inspect_shows_what_the_graphs_cost() -> None:
    facts = inspect_bundle(bundle())
    graph = facts["graphs"][0]
    assert graph["prefill_paths"] == [
        "onnx/model_quantized_prefill.onnx",
        "onnx/model_quantized_windowed_prefill.onnx",
    ]
    files = bundle().manifest.files
    assert graph["prefill_bytes"] == sum(
        record.size_bytes for name, record in files.items() if "prefill" in name
    )
    assert any("graphs for prompts: " in line for line in bundle_lines(facts))
