"""Parity of exported graphs: correct ones pass, broken ones are caught and located."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from gemma3_export.bundle import Bundle, write_manifest
from gemma3_export.errors import InputError
from gemma3_export.parity import GroundTruth, VerifyOptions, compare, verify
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights.bundle_weights import OnnxWeights
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.exported_bundles import SEED, TARGETS, exported_bundle, source_of
from tests.support.tiny_models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = VerifyOptions(decode_steps=12, greedy_steps=6)


@pytest.fixture(scope="module")
def ground_truth() -> GroundTruth:
    source = source_of()
    return GroundTruth.for_runtime(
        ReferenceRuntime(load_reference(source)), source, options=OPTIONS
    )


def open_onnx(path: Path) -> OnnxRuntime:
    return OnnxRuntime(path, device="cpu", threads=1)


@pytest.mark.parametrize("target", TARGETS)
def test_an_exported_graph_passes(target: str, ground_truth: GroundTruth) -> None:
    report = verify(open_onnx(exported_bundle(target)), source_of(), ground_truth=ground_truth)
    assert report.passed, report.to_json()
    assert report.candidate["providers"] == ["CPUExecutionProvider"]
    assert "padded" in {case.name for case in report.cases}


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_verifies_against_its_own_weights(target: str) -> None:
    bundle = Bundle(exported_bundle(target))
    files = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    runtime = open_onnx(bundle.path)
    report = verify(runtime, OnnxWeights(bundle), options=OPTIONS, files=files)
    assert report.passed
    assert report.files == files


def test_two_targets_agree_with_each_other(ground_truth: GroundTruth) -> None:
    first, second = (open_onnx(exported_bundle(target)) for target in TARGETS)
    report = compare(first, second, source_of(), ground_truth=ground_truth)
    assert report.passed
    assert report.baseline["target"] == "portable"


def test_a_bundle_of_other_weights_fails_at_the_embedding(ground_truth: GroundTruth) -> None:
    other = RandomSource(tiny_config(), SEED + 1)
    report = verify(open_onnx(exported_bundle("ort")), other, options=OPTIONS)
    assert not report.passed
    assert not all(gate.passed for gate in report.gates)


def test_a_bundle_of_another_shape_is_rejected() -> None:
    other = RandomSource(tiny_config(intermediate_size=64), SEED)
    with pytest.raises(InputError, match=r"mlp\.down_proj\.weight is \(48, 80\) in the runtime"):
        verify(open_onnx(exported_bundle("ort")), other, options=OPTIONS)


def in_layer(model: Any, layer: int, op_type: str, index: int = 0) -> Any:
    nodes = [
        node
        for node in model.graph.node
        if node.op_type == op_type and node.name.startswith(f"layer_{layer}.")
    ]
    return nodes[index]


def set_attribute(node: Any, name: str, value: Any) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def attribute(node: Any, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def widen_window(model: Any) -> None:
    node = in_layer(model, 2, "GroupQueryAttention")
    set_attribute(node, "local_window_size", attribute(node, "local_window_size") + 1)


def narrow_window(model: Any) -> None:
    node = in_layer(model, 4, "GroupQueryAttention")
    set_attribute(node, "local_window_size", attribute(node, "local_window_size") - 1)


def change_fused_scale(model: Any) -> None:
    set_attribute(in_layer(model, 1, "GroupQueryAttention"), "scale", 0.25)


def change_scale(model: Any) -> None:
    set_attribute(in_layer(model, 1, "Attention"), "scale", 0.25)


def swap_rotary_tables(model: Any) -> None:
    """Give a sliding layer the angles of a full-attention layer."""
    full, sliding = (in_layer(model, n, "GroupQueryAttention") for n in (0, 2))
    sliding.input[7], sliding.input[8] = full.input[7], full.input[8]


def exact_gelu(model: Any) -> None:
    set_attribute(in_layer(model, 3, "Gelu"), "approximate", "none")


@pytest.mark.parametrize(
    ("target", "mutate", "layer", "block"),
    [
        ("ort", widen_window, 2, "self_attn.attend"),
        ("ort", narrow_window, 4, "self_attn.attend"),
        ("ort", change_fused_scale, 1, "self_attn.attend"),
        ("ort", swap_rotary_tables, 2, "self_attn.rotary"),
        ("ort", exact_gelu, 3, "mlp"),
        ("portable", change_scale, 1, "self_attn.attend"),
        ("portable", exact_gelu, 3, "mlp"),
    ],
)
def test_a_broken_graph_is_caught_and_located(
    target: str,
    mutate: Callable[[Any], None],
    layer: int,
    block: str,
    ground_truth: GroundTruth,
    tmp_path: Path,
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(exported_bundle(target), path)
    bundle = Bundle(path)
    graph = bundle.file(bundle.graph("onnx").path)
    model = onnx.load(graph, load_external_data=False)
    mutate(model)
    graph.write_bytes(model.SerializeToString())
    write_manifest(path, bundle.manifest, {})
    report = verify(open_onnx(path), source_of(), ground_truth=ground_truth)
    assert not report.passed
    assert report.divergence is not None
    assert (report.divergence.layer, report.divergence.block) == (layer, block)
