"""8-bit weights and activations for ONNX Runtime on the CPU, with one scale per row of each."""

from __future__ import annotations

import functools
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import BlockFormat, Bundle
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.quantize.smoothing import smoothing_factors
from gemma3_export.parity import ParityReport, VerifyOptions, verify
from gemma3_export.parity.rounding import round_to_int8
from gemma3_export.processor_kind import parse_cpuinfo
from gemma3_export.reference.weights.block_matrix import quantize
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.onnx import session
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.command_line import run_rejected
from tests.support.exported_bundles import accept_changes, exported
from tests.support.tiny_models import tiny_config

LAYERS = 2
CONFIG = tiny_config(num_hidden_layers=LAYERS, layer_types=("sliding_attention", "full_attention"))
SEED = 5
OPTIONS = VerifyOptions(decode_steps=8, greedy_steps=4, min_top1=0.85, locate=False)
GRAPH = "onnx/model_w8a8.onnx"
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (3, 40))


@functools.cache
def bundle(tied: bool = True) -> Bundle:
    config = CONFIG if tied else replace(CONFIG, tie_word_embeddings=False)
    return Bundle(exported(OnnxWriter(dtype="w8a8"), config, SEED))


def check(path: Path) -> ParityReport:
    found = Bundle(path)
    return verify(
        open_runtime(found, "onnx", device="cpu", threads=1),
        open_bundle_weights(found, "onnx"),
        options=OPTIONS,
        full_source=RandomSource(found.config, SEED),
    )


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path / GRAPH, load_external_data=False).graph


@pytest.mark.parametrize("tied", [True, False])
def test_both_graphs_compute_what_a_reference_computes_that_rounds_as_they_do(tied: bool) -> None:
    report = check(bundle(tied).path)
    assert report.passed
    names = {case.name for case in report.cases}
    assert {"padded", "windowed-decode", "float-chunked"} <= names
    # Sums of integers are exact: only a code near a midpoint makes a difference, now and then.
    errors = [m.value for case in report.cases for m in case.metrics if m.name == "logits_max_abs"]
    assert np.median(errors) < 1e-5


def damaged(path: Path, changed: str) -> Path:
    """Return a copy of the bundle with the signs of a column of a constant changed."""
    copied = Path(shutil.copytree(bundle().path, path / "bundle"))
    for file in (copied / "onnx").glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name.startswith(changed))
        matrix = onnx.numpy_helper.to_array(tensor).copy()
        matrix[..., 1] *= -1
        tensor.CopyFrom(onnx.numpy_helper.from_array(matrix, tensor.name))
        file.write_bytes(model.SerializeToString())
    accept_changes(copied)
    return copied


def test_parity_notices_another_rotation(tmp_path: Path) -> None:
    assert not check(damaged(tmp_path, "integer_products.hadamard")).passed


def test_prompts_and_decoding_read_one_copy_of_the_weights() -> None:
    graph = graph_of(bundle().path)
    found = [node.op_type for node in graph.node]
    assert found.count("MatMulIntegerToFloat") == 4 * LAYERS + 1
    assert not {"MatMulNBits", "Gemm"} & set(found)
    stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len(stored) == 4 * LAYERS + 1  # the embedding is the head
    matrices = sum(np.prod(shape) for _, shape in CONFIG.weight_shapes() if len(shape) == 2)
    assert sum(np.prod(tensor.dims) for tensor in stored) == matrices
    assert next(n for n in graph.node if "logits" in n.output).op_type == "MatMulIntegerToFloat"


@pytest.mark.parametrize("is_windowed", [True, False])
def test_a_row_gets_the_same_bits_whatever_the_other_rows_hold(is_windowed: bool) -> None:
    model = OnnxRuntime(bundle(), device="cpu", threads=1, sliding_window_cache=is_windowed)

    def decoded(tokens: np.ndarray) -> np.ndarray:
        cache = model.new_cache(len(tokens), 60)
        model.step(tokens[:, :30], cache, num_logits=1)
        steps = [model.step(tokens[:, at : at + 1], cache, num_logits=1) for at in range(30, 40)]
        return np.concatenate(steps, axis=1)

    others = np.random.default_rng(8).integers(0, CONFIG.vocab_size, TOKENS.shape)
    others[1] = TOKENS[1]
    np.testing.assert_array_equal(decoded(TOKENS)[1], decoded(others)[1])


def test_dequantized_weights_are_close_to_those_that_were_exported() -> None:
    source, weights = RandomSource(CONFIG, SEED), open_bundle_weights(bundle(), "onnx")
    for name, shape in CONFIG.weight_shapes():
        exact = source.read(name).float()
        error = (weights.read(name).float() - exact).norm() / exact.norm().clamp(min=1e-9)
        assert error < 0.01
        part = weights.read(name, 1, shape[0] - 1)
        assert bool((part == weights.read(name)[1:-1]).all())


def test_smoothing_gives_activations_and_weights_the_same_range() -> None:
    activations, weights = torch.tensor([400.0, 2.0, 0.0, 9.0]), torch.tensor([0.25, 8.0, 3.0, 0.0])
    factors = smoothing_factors(activations, weights)
    assert factors[2:].tolist() == [1.0, 1.0]  # one has no input, one no weight
    ratios = ((activations / factors) / (weights * factors))[:2]
    assert float(ratios[0] / ratios[1]) == pytest.approx(1, rel=1e-5)
    assert float(factors.log().sum()) == pytest.approx(0, abs=1e-5)
    assert smoothing_factors(torch.tensor([1.0, 1e30]), torch.ones(2)).tolist() == [1 / 64, 64]


def test_smoothing_an_outlier_makes_products_more_accurate() -> None:
    generator = torch.Generator().manual_seed(6)
    x, weights = (torch.randn(size, 64, generator=generator) for size in (20, 30))
    x[:, 5] *= 300
    rows = BlockFormat.rotated_rows(64)
    factors = smoothing_factors(x.abs().amax(0), weights.abs().amax(0))

    def error(weight_format: BlockFormat, smoothing: torch.Tensor | None) -> float:
        stored = quantize(weights, weight_format, smoothing=smoothing).dequantize()
        product = round_to_int8(x, weight_format, smoothing) @ stored.T
        return float((product - x @ weights.T).square().mean())

    assert error(replace(rows, is_smoothed=True), factors) < error(rows, None) / 4


def test_smoothing_changes_constants_only() -> None:
    graph = graph_of(bundle().path)
    known = {tensor.name for tensor in graph.initializer}
    divided = 0
    for node in graph.node:
        if all(name in known for name in node.input):
            known.update(node.output)
            divided += sum(name.endswith(".smoothing") for name in node.input)
        else:
            assert not any(name.endswith(".smoothing") for name in node.input)
    assert divided == 3 * LAYERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "portable"}, "target portable supports fp32 only, not w8a8"),
        ({"target": "web"}, "target web supports fp32 and int8 only, not w8a8"),
        ({"activations": "bf16"}, "--activations bf16 requires --dtype int8, keep, int4, mixed"),
        ({"block_size": 64}, "dtype w8a8 has one scale per row"),
    ],
)
def test_what_it_does_not_have_is_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxWriter(dtype="w8a8", **options)  # type: ignore[arg-type]


def test_a_block_size_is_rejected_on_the_command_line(tmp_path: Path) -> None:
    assert "--block-size" in run_rejected(
        "onnx", "--weights", tmp_path, "--dtype", "w8a8", "--block-size", 64, "-o", tmp_path / "o"
    )


def test_rows_that_cannot_be_rotated_are_rejected(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=40, num_hidden_layers=1, layer_types=("full_attention",))
    with pytest.raises(InputError, match="40 columns, not a multiple of 16"):
        exported(OnnxWriter(dtype="w8a8"), config)


@pytest.mark.parametrize(
    ("flags", "is_exact"),
    [("fpu avx2 avx512f", False), ("fpu avx2 avx512_vnni", True), ("avx_vnni avx2", True)],
)
def test_products_are_exact_on_processors_without_vnni_too(
    monkeypatch: pytest.MonkeyPatch, flags: str, is_exact: bool
) -> None:
    text = f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n"
    processor = parse_cpuinfo(text, otherwise="")
    monkeypatch.setattr(session, "read_processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    entries = session.product_entries(bundle().graph("onnx"))
    assert entries == ({} if is_exact else {"session.x64quantprecision": "1"})
    blocks = Bundle(exported(OnnxWriter(dtype="int8", block_size=16), CONFIG, SEED))
    assert not session.product_entries(blocks.graph("onnx"))
