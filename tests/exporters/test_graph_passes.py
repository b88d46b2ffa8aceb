"""Graph passes change only graphs with their pattern, and run in the order of the table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from gemma3_export.bundle import Signature
from gemma3_export.exporters.onnx.fused_norms import FuseBfloat16Norms, FuseNorms
from gemma3_export.exporters.onnx.passes import MODEL_PASSES, SLIDING_WINDOW_PASSES, GraphPlan
from gemma3_export.exporters.onnx.quantize_weights import QuantizeWeights
from gemma3_export.exporters.onnx.sliding_window import UseSlidingWindowCache
from gemma3_export.exporters.onnx.stack_layers import StackLayers
from tests.exporters.test_half_precision import half_bundle
from tests.support.tiny_models import TINY, tiny_config

CONFIG = tiny_config()
WITHOUT_PATTERNS = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
graph (float[B, 4] x, float[4] scale) => (float[B, 4] y)
{
    doubled = Mul (x, x)
    normed = RMSNormalization <axis: int = -1, epsilon: float = 1e-6> (doubled, scale)
    y = Neg (normed)
}
"""
RESIDUAL_NORM = WITHOUT_PATTERNS.replace("Mul", "Add")


def model_of(text: str) -> ir.Model:
    return ir.from_proto(parser.parse_model(text))


@pytest.mark.parametrize(
    "graph_pass",
    [
        StackLayers(CONFIG, Signature.of(CONFIG)),
        QuantizeWeights({}),
        UseSlidingWindowCache(),
        FuseNorms(),
        FuseBfloat16Norms(),
    ],
    ids=lambda graph_pass: type(graph_pass).__name__,
)
def test_a_graph_without_the_pattern_is_left_as_it_is(graph_pass: ir.passes.InPlacePass) -> None:
    model = model_of(WITHOUT_PATTERNS)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not graph_pass(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_residual_add_and_its_norm_become_one_node() -> None:
    model = model_of(RESIDUAL_NORM)
    assert FuseNorms()(model).modified
    assert [node.op_type for node in model.graph] == ["SkipSimplifiedLayerNormalization", "Neg"]


def test_a_layer_in_bfloat16_has_no_casts_and_one_split() -> None:
    """A GPU starts a kernel for each of these nodes, which is what a small model's step costs."""
    graph = onnx.load(
        half_bundle("bf16") / "onnx" / "model_bf16.onnx", load_external_data=False
    ).graph
    made_at_load = {  # from weights alone; runtimes fold these nodes
        node.output[0]
        for node in graph.node
        if node.op_type == "Add" and node.input[0].endswith("norm.weight")
    }
    counts = Counter(
        node.op_type
        for node in graph.node
        if node.name.startswith("layer_3.")
        and node.output[0] not in made_at_load
        and node.input[0] not in made_at_load
    )
    assert counts == {
        "MatMul": 4,
        "BranchwiseRMSNorm": 2,  # after attention and after the feed-forward network
        "SkipSimplifiedLayerNormalization": 2,  # before them, with the residual additions
        "GroupQueryAttention": 1,
        "Split": 1,
        "Gelu": 1,
        "Mul": 1,
    }


def test_attention_in_bfloat16_takes_the_packed_projection_and_the_scales_of_its_head_norms() -> (
    None
):
    graph = onnx.load(
        half_bundle("bf16") / "onnx" / "model_bf16.onnx", load_external_data=False
    ).graph
    makers = {name: node for node in graph.node for name in node.output}
    (node,) = (
        node
        for node in graph.node
        if node.op_type == "GroupQueryAttention" and node.name.startswith("layer_2.")
    )
    assert makers[node.input[0]].op_type == "MatMul"
    assert list(node.input[1:3]) == ["", ""]
    for name, weight in zip(node.input[14:], ("q_norm", "k_norm"), strict=True):
        scale = makers[makers[name].input[0]]
        assert scale.input[0] == f"model.layers.2.self_attn.{weight}.weight"
    epsilon = next(a.f for a in node.attribute if a.name == "qk_norm_epsilon")
    assert epsilon == np.float32(TINY.rms_norm_eps)


@pytest.mark.parametrize(
    ("plan", "model_passes", "window_passes"),
    [
        (
            GraphPlan(config=CONFIG, target="portable"),
            ["StackLayers", "DeclareSignature"],
            [],
        ),
        (
            GraphPlan(config=CONFIG),
            ["StackLayers", "AcceptLeftPadding", "RejectLongWindows", "DeclareSignature"],
            ["ExpectRightPadding", "UseSlidingWindowCache", "FuseNorms", "DeclareSignature"],
        ),
        (
            GraphPlan(config=CONFIG, is_screened=True),
            ["StackLayers", "AcceptLeftPadding", "RejectLongWindows", "DeclareSignature"],
            [
                "ExpectRightPadding",
                "UseSlidingWindowCache",
                "FuseNorms",
                "ScreenHead",
                "DeclareSignature",
            ],
        ),
        (
            GraphPlan(config=CONFIG, dtype="bf16", cache_dtype="bfloat16"),
            ["StackLayers", "FuseBfloat16Norms", "RejectLeftPadding", "DeclareSignature"],
            ["UseSlidingWindowCache", "FuseNorms", "DeclareSignature"],
        ),
        (
            GraphPlan(config=CONFIG, dtype="int8"),
            [
                "StackLayers",
                "FuseResidualNorms",
                "AcceptLeftPadding",
                "RejectLongWindows",
                "DeclareSignature",
                "QuantizeWeights",
            ],
            ["ExpectRightPadding", "UseSlidingWindowCache", "FuseNorms", "DeclareSignature"],
        ),
    ],
    ids=["portable", "ort fp32", "ort fp32 screened", "ort bf16", "ort int8"],
)
def test_each_export_runs_the_passes_for_its_target_and_dtype(
    plan: GraphPlan, model_passes: list[str], window_passes: list[str]
) -> None:
    def names(rows: tuple) -> list[str]:  # type: ignore[type-arg]
        return [type(row.make(plan)).__name__ for row in rows if row.applies(plan)]

    assert names(MODEL_PASSES)[-len(model_passes) :] == model_passes
    assert names(SLIDING_WINDOW_PASSES) == window_passes
