"""Quantized matrices with half-precision activations, made for CUDA and checked on the CPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import BlockFormat, Bundle
from gemma3_export.cli.command_line import command_line
from gemma3_export.config import config_to_json
from gemma3_export.cuda.placement import check_placement
from gemma3_export.device import Device
from gemma3_export.errors import InputError, ParityError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.parity import ParityReport, render_terminal, verify
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.block_matrix import quantize
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.onnx.graph_selection import device_for
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.exporters.test_quantized_export import (
    GGUF_CONFIG,
    OPTIONS,
    random_k_blocks,  # noqa: F401  (a fixture)
)
from tests.parity.test_activation_range import LOUD, scaled
from tests.runtimes.test_device_decoding import counted
from tests.support.cuda_python import cuda_python
from tests.support.exported_bundles import exported, exported_bundle
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf

CONFIG = tiny_config(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ONNX_TYPES = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
UNIT = {name: torch.finfo(dtype).eps / 2 for name, dtype in HALF.items()}


@functools.cache
def bundle_of(activations: str) -> Bundle:
    writer = OnnxWriter(dtype="int8", activations=activations, block_size=16)
    return Bundle(exported(writer, CONFIG, 5))


def kept_bundle(kind: str, activations: str, folder: Path) -> Bundle:
    weights = folder / "model.gguf"
    write_gguf(weights, GGUF_CONFIG, tiny_weights(GGUF_CONFIG), kind)
    with open_weights(str(weights)) as source:
        writer = OnnxWriter(dtype="keep", activations=activations)
        return Bundle(export_bundle(source, folder / "bundle", writer).path)


def report_of(bundle: Bundle, full: RandomSource | None = None) -> ParityReport:
    return verify(
        open_runtime(bundle, "onnx", device="cpu"),
        open_bundle_weights(bundle, "onnx"),
        options=OPTIONS,
        full_source=full,
    )


def graph_of(bundle: Bundle) -> Any:
    path = bundle.file(bundle.graph("onnx").path)
    return onnx.load(path, load_external_data=False).graph


@pytest.mark.parametrize("activations", HALF)
def test_parity_holds_in_the_precision_of_the_activations(activations: str) -> None:
    report = report_of(bundle_of(activations), RandomSource(CONFIG, 5))
    assert report.passed, render_terminal(report)
    name = str(HALF[activations]).removeprefix("torch.")
    assert report.noise_floor_dtype == report.candidate["activations"] == name
    computed = {"bf16": "float32, rounded to bfloat16", "fp16": "float16"}
    assert report.candidate["computed_in"] == computed[activations]
    assert report.ranges is not None
    assert report.ranges.weights == (), "the matrices are codes"
    assert f"int8 with {name} activations" in render_terminal(report)


@pytest.mark.usefixtures("random_k_blocks")
@pytest.mark.parametrize(("kind", "activations"), [("Q4_K", "bf16"), ("Q5_K", "fp16")])
def test_repacked_blocks_keep_codes_and_minimums(
    kind: str, activations: str, tmp_path: Path
) -> None:
    bundle = kept_bundle(kind, activations, tmp_path)
    report = report_of(bundle)
    assert report.passed, render_terminal(report)
    kept = open_bundle_weights(bundle, "onnx")
    with open_weights(str(tmp_path / "model.gguf")) as source:
        for name, shape in GGUF_CONFIG.weight_shapes():
            wanted, found = source.read(name).float(), kept.read(name).float()
            if len(shape) == 1:
                assert torch.equal(found, wanted), name
            else:  # the scales alone are rounded; a code times a scale is up to 255 of them
                step = wanted.abs().max() / 15
                assert (found - wanted).abs().max() <= 255 * step * UNIT[activations], name
    minimums = [item for item in graph_of(bundle).initializer if item.name.endswith("minimums")]
    assert {item.data_type for item in minimums} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("activations", HALF)
def test_scales_and_cache_are_half_and_inputs_are_not_rounded(activations: str) -> None:
    graph = graph_of(bundle_of(activations))
    kinds = {tensor.data_type for tensor in graph.initializer if tensor.name.endswith("scales")}
    assert kinds == {ONNX_TYPES[activations]}
    for value in (*graph.input, *graph.output):
        if "." in value.name:
            assert value.type.tensor_type.elem_type == ONNX_TYPES[activations], value.name
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * 2 + 1
    levels = {a.i for node in products for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {0}
    assert open_bundle_weights(bundle_of(activations), "onnx").activation_blocks == {}


@pytest.mark.parametrize("activations", HALF)
def test_codes_fit_the_stored_scales(activations: str) -> None:
    weights = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    names = {"bf16": "bfloat16", "fp16": "float16"}
    block_format = BlockFormat(bits=8, block_size=32, scale_type=names[activations])
    matrix = quantize(weights, block_format)
    assert torch.equal(matrix.scales, matrix.scales.to(HALF[activations]).float())
    error = (matrix.dequantize() - weights).abs().view(16, 2, 32)
    clipped = 127 * UNIT[activations]  # of the largest number, where the scale was rounded down
    assert (error <= matrix.scales[..., None] * max(0.5001, clipped)).all()
    assert (error.amax(-1) > 0.3 * matrix.scales).any()


@pytest.mark.parametrize("changed", ["self_attn.v_proj.weight", "input_layernorm.weight"])
def test_a_changed_weight_is_found(changed: str) -> None:
    bundle = bundle_of("bf16")
    right = open_bundle_weights(bundle, "onnx")

    class Changed(RandomSource):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            factor = 3.0 if name == f"model.layers.1.{changed}" else 1.0
            return right.read(name, start, stop) * factor

    report = verify(open_runtime(bundle, "onnx"), Changed(CONFIG, 5), options=OPTIONS)
    assert not report.passed


def test_the_error_for_overflowing_fp16_activations_names_an_alternative(
    tmp_path: Path,
) -> None:
    writer = OnnxWriter(dtype="int8", activations="fp16", block_size=16)
    with pytest.raises(ParityError, match=r"mlp\.product in layer 1.*--activations bf16"):
        export_bundle(scaled(LOUD), tmp_path / "out", writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_require_quantized_matrices(dtype: str) -> None:
    with pytest.raises(InputError, match=rf"not {dtype}; .*--dtype fp16"):
        OnnxWriter(dtype=dtype, activations="fp16")
    with pytest.raises(InputError, match="choose fp32, bf16, fp16"):
        OnnxWriter(dtype="int8", activations="int8")


def test_the_command_line_exports_and_inspects_half_activations(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    small = tiny_config(num_hidden_layers=1, layer_types=("sliding_attention",))
    config.write_text(json.dumps(config_to_json(small)), encoding="utf-8")
    out = tmp_path / "out"
    options = ["--dtype", "int8", "--block-size", "16", "--activations", "bf16", "--no-verify"]
    source = ["--random-weights", "1", "--config", str(config)]
    done = CliRunner().invoke(command_line, ["onnx", *source, *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "int8 with bf16 activations" in done.output
    assert Bundle(out).graph("onnx").cache_dtype == "bfloat16"


# Where graphs may run


class FakeGpu:
    """Make device selection believe that there is a GPU."""

    def __call__(self, name: str) -> Device:
        return Device("cpu") if name == "cpu" else Device("cuda")


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Bundle(exported_bundle("ort")), "--dtype bf16, or with .* --target portable"),
        (lambda: bundle_of("fp32"), "--dtype int8 --activations bf16"),
    ],
    ids=["fp32", "int8"],
)
def test_float32_attention_does_not_silently_run_on_the_cpu(
    make: Callable[[], Bundle], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma3_export.runtimes.onnx.graph_selection.choose_device", FakeGpu())
    with pytest.raises(InputError, match=f"no kernel on CUDA; export with {remedy}"):
        OnnxRuntime(make(), device="cuda")
    assert OnnxRuntime(make(), device="auto", threads=1).device == Device("cpu")


def test_graphs_with_attention_kernels_on_cuda_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma3_export.runtimes.onnx.graph_selection.choose_device", FakeGpu())
    for bundle in (bundle_of("bf16"), Bundle(exported_bundle("portable"))):
        for name in ("auto", "cuda"):
            assert device_for(bundle.graph("onnx"), name) == Device("cuda")


@pytest.mark.placement
@pytest.mark.parametrize("activations", HALF)
def test_quantized_graphs_run_on_the_gpu_from_end_to_end(activations: str) -> None:
    report = check_placement(bundle_of(activations), cuda_python())
    assert report.passed, report.problems
    on_gpu = report.operators["CUDAExecutionProvider"]
    assert on_gpu["MatMulNBits"] == 4 * 2 + 1
    assert on_gpu["GroupQueryAttention"] == 2
    assert on_gpu["GatherBlockQuantized"] == 1
    assert report.memory_copies == ()
    assert report.is_capturable


@pytest.mark.placement
@pytest.mark.usefixtures("random_k_blocks")
def test_blocks_with_minimums_run_on_the_gpu_from_end_to_end(tmp_path: Path) -> None:
    report = check_placement(kept_bundle("Q4_K", "bf16", tmp_path), cuda_python())
    assert report.passed, report.problems


@pytest.mark.placement
def test_a_quantized_decode_step_is_a_few_graph_launches() -> None:
    found = counted(bundle_of("bf16").path, graph=True)
    assert found["steps"][-1]["graph_launches"] == 3, "the new token, the model, the selection"
    assert sum(step["capture_violations"] for step in found["steps"]) == 0
