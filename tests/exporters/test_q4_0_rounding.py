"""Checkpoints trained for Q4_0: its own rule, how they are recognized, and what GPTQ would cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from gemma3_export.api.verification import ParityCheck
from gemma3_export.bundle import Bundle, Graph
from gemma3_export.bundle.inspection import rounding_line
from gemma3_export.config import EMBEDDING, config_to_json
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.quantize.calibration import CalibrationOptions
from gemma3_export.exporters.quantize.q4_0 import (
    GgufRounding,
    reason_for_q4_0,
    round_q4_0,
    round_q8_0,
)
from gemma3_export.exporters.quantize.quantizers import matrix_names
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.block_matrix import BlockMatrix
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from tests.support.command_line import run_ok
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder

CONFIG = tiny_config(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    layer_types=("sliding_attention", "full_attention"),
)
Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
PLAN = CalibrationOptions(sequences=24, tokens=24)


def hostile_weights() -> torch.Tensor:
    """Return blocks with ties, zeros, one value, halves between two codes, and tiny numbers."""
    weights = torch.randn(40, 96, generator=torch.Generator().manual_seed(3)) * 0.05
    weights[1, :32] = 0
    weights[2, :32] = torch.tensor([0.5, -0.5] * 16)  # a tie of the largest magnitude
    weights[3, :32] = torch.tensor([-0.5, 0.5] * 16)
    weights[4, :32] = -1.25
    weights[5, :32] = torch.arange(-16, 16) / 16  # every second one is a half
    weights[6, :32] = torch.arange(16, -16, -1) / 16
    weights[7, :32] *= 1e-7  # float16 scales round to subnormal numbers
    weights[8, :32] *= 1e-30  # float16 scales round to zero
    weights[9, 40:] = -0.0
    return weights


def packed(matrix: BlockMatrix) -> np.ndarray:
    """Return a matrix as GGUF stores it: float16 scales, and nibbles of both halves of a block."""
    rows = len(matrix.codes)
    codes = matrix.codes.numpy().reshape(rows, -1, 32)
    is_wide = matrix.format.bits == 8
    stored = codes ^ 128 if is_wide else codes[..., :16] | codes[..., 16:] << 4
    scales = matrix.scales.numpy().astype(np.float16)[..., None].view(np.uint8)
    return np.concatenate((scales, stored), axis=-1).reshape(rows, -1)


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_qat_folder(folder: Path, *, with_tables: bool = True) -> Path:
    """Write bfloat16 weights that lie on Q4_0's grid, as llama.cpp would round them."""
    weights = {}
    for name, tensor in tiny_weights(CONFIG, seed=6).items():
        is_matrix = tensor.ndim == 2 and (with_tables or name != EMBEDDING)
        values = dequantize(quantize(tensor.numpy(), Q4_0), Q4_0) if is_matrix else tensor.numpy()
        weights[name] = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    return write_weights(folder, weights)


def export(weights: Path, output: Path, writer: OnnxWriter) -> Graph:
    with open_weights(str(weights)) as source:
        export_bundle(source, output, writer)
    return Bundle(output).graph("onnx")


# The rule


def test_the_rule_of_q4_0_equals_the_gguf_package_bit_for_bit() -> None:
    weights = hostile_weights()
    np.testing.assert_array_equal(packed(round_q4_0(weights)), quantize(weights.numpy(), Q4_0))


def test_the_rule_of_q8_0_equals_the_gguf_package_bit_for_bit() -> None:
    weights = hostile_weights()
    np.testing.assert_array_equal(packed(round_q8_0(weights)), quantize(weights.numpy(), Q8_0))


def test_int4_and_keep_hold_what_the_q4_0_gguf_holds(tmp_path: Path) -> None:
    weights = tiny_weights(CONFIG, seed=7)
    for name, tensor in weights.items():
        if tensor.ndim == 2 and name != EMBEDDING:
            tensor[:16, :32] = hostile_weights()[:16, :32]
    write_weights(tmp_path / "weights", weights)
    write_gguf(tmp_path / "model.gguf", CONFIG, weights, "Q4_0")
    writer = OnnxWriter(dtype="int4", rounding="q4_0")
    graph = export(tmp_path / "weights", tmp_path / "int4", writer)
    assert graph.calibration == {"rounding": "q4_0", "reason": "requested"}
    export(tmp_path / "model.gguf", tmp_path / "kept", OnnxWriter(dtype="keep"))
    ours = open_bundle_weights(Bundle(tmp_path / "int4"), "onnx")
    kept = open_bundle_weights(Bundle(tmp_path / "kept"), "onnx")
    with open_weights(str(tmp_path / "model.gguf")) as source:
        for name in matrix_names(CONFIG):
            tensor = source.gguf_tensor(name)
            assert tensor is not None
            stored = (
                np.ascontiguousarray(tensor.data).view(np.uint8).reshape(len(weights[name]), -1)
            )
            exact = weights[name].numpy()
            np.testing.assert_array_equal(stored, quantize(exact, Q4_0), name)
            expected = dequantize(stored, Q4_0).view(np.int32)  # bits, so that -0.0 is not 0.0
            assert np.array_equal(kept.read(name).numpy().view(np.int32), expected), name
            if name == EMBEDDING:  # not on the grid, so it has 8 bits
                expected = dequantize(quantize(exact, Q8_0), Q8_0).view(np.int32)
            assert np.array_equal(ours.read(name).numpy().view(np.int32), expected), name


# Recognition


def test_weights_on_the_grid_of_q4_0_are_recognized_and_keep_their_values(tmp_path: Path) -> None:
    folder = write_qat_folder(tmp_path / "weights")
    writer = OnnxWriter(dtype="int4", calibration=PLAN, max_kld=0.02)
    with open_weights(str(folder)) as source:
        result = export_bundle(source, tmp_path / "int4", writer, verification=ParityCheck())
        assert result.verified
        graph = Bundle(tmp_path / "int4").graph("onnx")
        assert graph.calibration is not None
        assert (graph.calibration["rounding"], graph.calibration["reason"]) == ("q4_0", "grid")
        divergence = graph.calibration["divergence"]
        assert 0 < divergence["q4_0"] < 1e-3  # the kernels' rounding of activations alone
        # GPTQ searches scales, finds those of the grid, and has no error left to compensate.
        assert divergence["gptq"] == pytest.approx(divergence["q4_0"])
        assert all(recipe.blocks.bits == 4 for recipe in graph.weights.values() if recipe.blocks)
        # bfloat16 weights differ from the grid by their own rounding: 2**-8, and in the scale too.
        ours = open_bundle_weights(Bundle(tmp_path / "int4"), "onnx")
        for name in matrix_names(CONFIG):
            exact = source.read(name).float()
            assert ((ours.read(name) - exact).abs() <= 2**-7 * exact.abs()).all(), name


@pytest.mark.parametrize("moved", ["down_proj", "q_proj"])
def test_one_weight_off_the_grid_is_enough_for_gptq(moved: str, tmp_path: Path) -> None:
    folder = write_qat_folder(tmp_path / "weights")
    with open_weights(str(folder)) as source:
        assert reason_for_q4_0(source, "auto") == "grid"
    weights = load_file(folder / "model.safetensors")
    (name,) = [key for key in weights if moved in key and ".layers.1." in key]
    weights[name][3, 5] += 0.3 * weights[name][3, :32].abs().max() / 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with open_weights(str(folder)) as source:
        assert reason_for_q4_0(source, "auto") is None


def test_ordinary_weights_are_not_taken_for_trained_ones(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "weights", CONFIG, seed=6, dtype=torch.bfloat16)
    with open_weights(str(tmp_path / "weights")) as source:
        assert reason_for_q4_0(source, "auto") is None
        assert reason_for_q4_0(source, "gptq") is None
        assert reason_for_q4_0(source, "q4_0") == "requested"


def test_a_qat_repository_off_the_grid_is_known_by_name_and_both_ways_are_measured(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "gemma-3-270m-it-qat-q4_0-unquantized"
    write_hf_folder(folder, CONFIG, seed=6, dtype=torch.bfloat16)
    graph = export(folder, tmp_path / "int4", OnnxWriter(dtype="int4", calibration=PLAN))
    assert graph.calibration is not None
    assert (graph.calibration["rounding"], graph.calibration["reason"]) == ("q4_0", "name")
    divergence = graph.calibration["divergence"]
    # These weights are random, so GPTQ, which sees the inputs, is the better way for the layers;
    # the embedding is stored in 8 bits by the rule, and in 4 by GPTQ.
    assert divergence["q4_0"] > 0
    assert divergence["gptq"] > 0
    assert divergence["q4_0"] != divergence["gptq"]
    assert rounding_line(graph.calibration) == (
        "by the rule of Q4_0, for which the repository says that it was trained; divergence "
        f"{divergence['q4_0']:.3g} nats per token (with GPTQ {divergence['gptq']:.3g})"
    )


@pytest.mark.parametrize("with_tables", [True, False])
def test_an_embedding_off_the_grid_keeps_8_bits(with_tables: bool, tmp_path: Path) -> None:
    folder = write_qat_folder(tmp_path / "weights", with_tables=with_tables)
    with open_weights(str(folder)) as source:
        formats = GgufRounding.of(source, "grid").formats
    assert {item.bits for name, item in formats.items() if name != EMBEDDING} == {4}
    assert formats[EMBEDDING].bits == (4 if with_tables else 8)
    assert {item.block_size for item in formats.values()} == {32}


# Options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8", "rounding": "q4_0"}, "applies to --dtype int4, not to int8"),
        ({"rounding": "q4_0", "block_size": 64}, "blocks of 32, not of 64"),
        ({"rounding": "nearest"}, "'nearest' is not supported; choose auto, gptq, q4_0"),
        (
            {"rounding": "q4_0", "calibration": replace(PLAN, file=Path("text.txt"))},
            "uses no calibration text",
        ),
    ],
)
def test_a_rounding_without_effect_is_rejected(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxWriter(**{"dtype": "int4", **change})  # type: ignore[arg-type]


def test_the_summary_and_inspect_say_how_the_weights_were_rounded(tmp_path: Path) -> None:
    folder, output = write_qat_folder(tmp_path / "weights"), tmp_path / "int4"
    made = run_ok(
        *("onnx", "--weights", folder, "--dtype", "int4", "--rounding", "q4_0"),
        *("--no-verify", "-o", output),
    )
    assert "rounded: by the rule of Q4_0, as requested" in made.stdout
    assert "rounded: by the rule of Q4_0, as requested" in run_ok("inspect", output).stdout
