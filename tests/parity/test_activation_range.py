"""Half-precision exports are refused when values exceed the dtype; others report their range.

The models are tiny; a factor on some weights makes their values large.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gemma3_export.api.verification import ParityCheck
from gemma3_export.bundle import PARITY, Bundle
from gemma3_export.errors import ParityError
from gemma3_export.exporters.bundle_writer import GraphWriter, export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.parity import VerifyOptions, render_terminal, verify
from gemma3_export.parity.activation_range import calibration_sequences, measure_ranges
from gemma3_export.parity.judge import at_most
from gemma3_export.parity.options import HalfPrecision
from gemma3_export.parity.report.model import HalfRanges
from gemma3_export.parity.sequences import TokenSequence, random_ids
from gemma3_export.progress import ignore_progress
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.exported_bundles import exported
from tests.support.tiny_models import TINY, tiny_config

SMALL = tiny_config(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
OPTIONS = VerifyOptions(decode_steps=8, greedy_steps=4)
MLP = "model.layers.1.mlp"
LOUD = {f"{MLP}.gate_proj.weight": 2000.0, f"{MLP}.up_proj.weight": 2000.0}
HALF = HalfPrecision(dtype=torch.float16, holds_residual=False)


class ScaledSource(RandomSource):
    """Random weights, some of them multiplied by a factor."""

    factors: Mapping[str, float] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return super().read(name, start, stop) * self.factors.get(name, 1.0)


def scaled(factors: Mapping[str, float]) -> ScaledSource:
    source = ScaledSource(SMALL, 5)
    source.factors = factors
    return source


def measured(source: RandomSource, half: HalfPrecision = HALF) -> HalfRanges:
    return measure_ranges(source, calibration_sequences(source.config, None), half, ignore_progress)


def fp16_bundle(is_tied: bool) -> Path:
    """Return the shared bundle in fp16."""
    return exported(OnnxWriter(dtype="fp16"), replace(SMALL, tie_word_embeddings=is_tied), 5)


@pytest.mark.parametrize("is_verified", [True, False])
def test_an_overflowing_mlp_product_is_rejected_by_name_and_leaves_no_output(
    is_verified: bool, tmp_path: Path
) -> None:
    verification = ParityCheck() if is_verified else None
    with pytest.raises(ParityError, match=r"mlp\.product in layer 1.*--dtype bf16") as caught:
        export_bundle(
            scaled(LOUD), tmp_path / "out", OnnxWriter(dtype="fp16"), verification=verification
        )
    (value,) = [part for part in str(caught.value).split() if "," in part and part[0].isdigit()]
    assert float(value.replace(",", "")) > 65504
    assert list(tmp_path.iterdir()) == []


def test_bf16_holds_values_that_overflow_fp16_and_reports_their_range(tmp_path: Path) -> None:
    source = scaled(LOUD)
    path = export_bundle(source, tmp_path / "out", OnnxWriter(dtype="bf16")).path
    runtime = OnnxRuntime(path, device="cpu", threads=1)
    options = replace(OPTIONS, min_top1=0.9)  # random logits lie close together
    proof = json.loads(verify(runtime, source, options=options).to_json())
    assert proof["passed"]
    assert [gate["name"] for gate in proof["gates"] if gate["passed"]][-1] == "range"
    largest = max(proof["ranges"]["tensors"], key=lambda item: item["share"])
    assert (largest["kind"], largest["layer"]) == ("mlp.product", 1)
    assert 65504 < largest["max_abs"] < 1e30
    assert largest["share"] == pytest.approx(largest["max_abs"] / torch.finfo(torch.bfloat16).max)


def test_an_ordinary_fp16_export_passes_and_carries_its_ranges(tmp_path: Path) -> None:
    config = replace(SMALL, num_hidden_layers=1, layer_types=("sliding_attention",))
    path = export_bundle(
        RandomSource(config, 5),
        tmp_path / "out",
        OnnxWriter(dtype="fp16"),
        verification=ParityCheck(),
    ).path
    ranges = json.loads((path / PARITY).read_text(encoding="utf-8"))["onnx/model_fp16.onnx"][
        "ranges"
    ]
    assert ranges["dtype"] == "float16"
    assert ranges["largest"] == 65504
    found = {(item["kind"], item["layer"]) for item in ranges["tensors"]}
    assert found >= {("mlp.product", 0), ("self_attn.q_proj", 0), ("head", None)}
    assert not any(kind == "residual" for kind, _ in found), "it is float32 in this graph"
    assert {item["name"] for item in ranges["weights"]} == {
        name for name, shape in config.weight_shapes() if len(shape) == 2
    }


@pytest.mark.parametrize("is_tied", [True, False])
def test_no_value_that_the_graph_holds_in_half_is_left_out(is_tied: bool) -> None:
    """Every float16 value of the graph is as large as one that is reported."""
    source = RandomSource(replace(SMALL, tie_word_embeddings=is_tied), 5)
    ids = random_ids(TINY, 0, 3, 24)
    ranges = measure_ranges(source, [TokenSequence("only", ids)], HALF, ignore_progress)
    seen = 0
    for layer, operator, largest in half_values(Bundle(fp16_bundle(is_tied)), ids):
        if operator == "Gelu":
            continue  # never larger than its input
        reported = [item.max_abs for item in ranges.tensors if item.layer == layer]
        if layer is None:  # the embedding's rows are weights
            reported += [item.max_abs for item in ranges.weights]
        assert any(abs(largest / value - 1) < 0.02 for value in reported), (layer, operator)
        seen += 1
    assert seen > 2 * 10


def half_values(bundle: Bundle, ids: np.ndarray) -> list[tuple[int | None, str, float]]:
    """Return layer, operator and largest element of every float16 value in a prefill of ``ids``."""
    runtime = OnnxRuntime(bundle, device="cpu", threads=1)
    model = onnx.load(runtime.path)
    known = {value.name for value in model.graph.output}
    places: dict[str, tuple[int | None, str]] = {}
    for node in model.graph.node:
        head, _, _ = node.name.partition(".")
        layer = int(head.removeprefix("layer_")) if head.startswith("layer_") else None
        places |= dict.fromkeys(node.output, (layer, node.op_type))
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in places if name not in known
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds: dict[str, Any] = {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])}
    shape = (1, TINY.num_key_value_heads, 0, TINY.head_dim)
    feeds |= {spec.name: np.zeros(shape, np.float16) for spec in runtime.signature.past}
    values = session.run(list(places), feeds)
    return [
        (*place, float(np.abs(value).max()))
        for place, value in zip(places.values(), values, strict=True)
        if value.dtype == np.float16 and value.ndim > 2
    ]


STREAM = {f"model.layers.{layer}.post_feedforward_layernorm.weight": 2e5 for layer in (0, 1)}


def test_a_residual_stream_beyond_fp16_is_proven_where_it_is_float32(tmp_path: Path) -> None:
    source = scaled(STREAM)
    assert max(item.max_abs for item in measured(source).tensors) < 1000
    path = export_bundle(source, tmp_path / "out", OnnxWriter(dtype="fp16")).path
    report = verify(OnnxRuntime(path, device="cpu", threads=1), source, options=OPTIONS)
    assert report.passed, render_terminal(report)
    limits = [metric.limit for case in report.cases for metric in case.metrics]
    assert all(math.isfinite(limit) for limit in limits)


def test_a_residual_stream_beyond_fp16_is_rejected_if_it_is_stored_in_half(tmp_path: Path) -> None:
    writer: GraphWriter = TorchScriptWriter(dtype="fp16")
    with pytest.raises(ParityError, match=r"residual in layer [01]"):
        export_bundle(scaled(STREAM), tmp_path / "out", writer)
    assert list(tmp_path.iterdir()) == []


def test_an_infinite_noise_floor_proves_nothing() -> None:
    assert at_most("error", 1.0, 0.5, 4.0).passed
    assert not at_most("error", 1.0, math.inf, math.inf).passed


@pytest.mark.parametrize(
    ("factor", "problem"), [(1e-6, "weight_rounding"), (1e8, "largest_weight")]
)
def test_weights_that_fp16_cannot_hold_are_named(
    factor: float, problem: str, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ParityError, match=rf"{problem} is .*{name}"):
        export_bundle(scaled({name: factor}), tmp_path / "out", OnnxWriter(dtype="fp16"))


def test_a_bundle_that_overflows_fails_its_range_gate() -> None:
    """For example one that an older version exported without this check."""
    runtime = OnnxRuntime(fp16_bundle(True), device="cpu", threads=1)
    report = verify(runtime, scaled(LOUD), options=VerifyOptions(decode_steps=2, locate=False))
    gates = {gate.name: gate for gate in report.gates}
    assert not gates["range"].passed
    assert "mlp.product in layer 1" in render_terminal(report)
