"""The graph passes of an export, in order, and the targets and dtypes that each is for.

To change an exported graph, write an ``onnx_ir`` pass and add a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as common

from gemma3_export.bundle import FUSED_TARGETS, ONNX_TARGETS, Signature
from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import EXPORT_DTYPES, DType, dtype_choices
from gemma3_export.exporters.onnx.fused_norms import (
    FuseBfloat16Norms,
    FuseNorms,
    FuseResidualNorms,
)
from gemma3_export.exporters.onnx.graph_cleanup import DeclareSignature, DropTracedShapes, Simplify
from gemma3_export.exporters.onnx.integer_products import ColumnProducts, IntegerProducts
from gemma3_export.exporters.onnx.left_padding import (
    AcceptLeftPadding,
    ExpectRightPadding,
    RejectLeftPadding,
)
from gemma3_export.exporters.onnx.minimum_version import RejectLongWindows
from gemma3_export.exporters.onnx.quantize_weights import QuantizedShape, QuantizeWeights
from gemma3_export.exporters.onnx.screened_head import ScreenHead
from gemma3_export.exporters.onnx.sliding_window import UseSlidingWindowCache
from gemma3_export.exporters.onnx.stack_layers import StackLayers

__all__ = ["MODEL_PASSES", "SLIDING_WINDOW_PASSES", "GraphPlan", "PassRow", "apply_passes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """The properties of an export that its graph passes depend on."""

    config: Gemma3Config
    target: str = "ort"
    dtype: str = "fp32"
    cache_dtype: DType = "float32"
    quantized: Mapping[str, QuantizedShape] = field(default_factory=dict)
    is_screened: bool = False  # model_windowed.onnx only

    @property
    def signature(self) -> Signature:
        """The inputs and outputs of the graph with growing caches."""
        return Signature.of(
            self.config,
            cache_dtype=self.cache_dtype,
            requires_num_logits=self.target == "web",
        )

    @property
    def sliding_window_signature(self) -> Signature:
        """The inputs and outputs of ``model_windowed.onnx``."""
        return Signature.of(
            self.config,
            cache_dtype=self.cache_dtype,
            is_windowed=True,
            is_screened=self.is_screened,
        )


@dataclass(frozen=True, slots=True)
class PassRow:
    """One pass, and the exports that it applies to."""

    make: Callable[[GraphPlan], ir.passes.PassBase]
    targets: Sequence[str]
    dtypes: Sequence[str]
    condition: Callable[[GraphPlan], bool] = lambda plan: True

    def applies(self, plan: GraphPlan) -> bool:
        """Return whether an export with this plan runs the pass."""
        return plan.target in self.targets and plan.dtype in self.dtypes and self.condition(plan)


ALL, FUSED, ORT, WEB = ONNX_TARGETS, FUSED_TARGETS, ("ort",), ("web",)
ANY = dtype_choices("onnx")
QUANTIZED = tuple(name for name in ANY if EXPORT_DTYPES[name].is_quantized)
PER_CHANNEL = tuple(name for name in ANY if EXPORT_DTYPES[name].is_per_channel)
BLOCKS = tuple(name for name in QUANTIZED if name not in PER_CHANNEL)
FLOAT_HEAD = ("fp32", "keep")  # a GGUF file may keep its head in float32

# From the trace to a variant's graph, such as model.onnx.
MODEL_PASSES = (
    PassRow(lambda plan: common.InlinePass(), ALL, ANY),
    PassRow(lambda plan: Simplify(), ALL, ANY),
    PassRow(
        lambda plan: common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ALL,
        ANY,
    ),
    PassRow(lambda plan: common.CommonSubexpressionEliminationPass(), ALL, ANY),
    PassRow(lambda plan: common.OutputFixPass(), ALL, ANY),
    PassRow(lambda plan: common.NameFixPass(), ALL, ANY),
    # Stack traces hold paths of the exporting machine, which do not belong in a bundle.
    PassRow(lambda plan: common.ClearMetadataAndDocStringPass(), ALL, ANY),
    PassRow(lambda plan: DropTracedShapes(), ALL, ANY),
    PassRow(lambda plan: StackLayers(plan.config, plan.signature), ALL, ANY),
    PassRow(
        lambda plan: FuseBfloat16Norms(), FUSED, ANY, lambda plan: plan.cache_dtype == "bfloat16"
    ),
    PassRow(
        lambda plan: FuseResidualNorms(), ORT, QUANTIZED, lambda plan: plan.cache_dtype == "float32"
    ),
    PassRow(
        lambda plan: AcceptLeftPadding(), FUSED, ANY, lambda plan: plan.cache_dtype == "float32"
    ),
    PassRow(
        lambda plan: RejectLeftPadding(), FUSED, ANY, lambda plan: plan.cache_dtype != "float32"
    ),
    # Graphs in half precision are for CUDA, where this package needs newer releases anyway.
    PassRow(lambda plan: RejectLongWindows(), ORT, ANY, lambda plan: plan.cache_dtype == "float32"),
    PassRow(lambda plan: DeclareSignature(plan.signature), ALL, ANY),
    PassRow(lambda plan: QuantizeWeights(plan.quantized), ORT, BLOCKS),
    PassRow(lambda plan: QuantizeWeights(plan.quantized, ColumnProducts), ORT, PER_CHANNEL),
    PassRow(lambda plan: common.RemoveUnusedNodesPass(), ORT, PER_CHANNEL),
    PassRow(lambda plan: QuantizeWeights(plan.quantized, IntegerProducts), WEB, BLOCKS),
)

# From that graph to the one with sliding-window caches, such as model_windowed.onnx.
SLIDING_WINDOW_PASSES = (
    PassRow(
        lambda plan: ExpectRightPadding(), ORT, ANY, lambda plan: plan.cache_dtype == "float32"
    ),
    PassRow(lambda plan: UseSlidingWindowCache(), ORT, ANY),
    PassRow(lambda plan: FuseNorms(), ORT, ANY),
    PassRow(lambda plan: ScreenHead(plan.config), ORT, FLOAT_HEAD, lambda plan: plan.is_screened),
    PassRow(lambda plan: DeclareSignature(plan.sliding_window_signature), ORT, ANY),
)


def apply_passes(rows: Sequence[PassRow], model: ir.Model, plan: GraphPlan) -> None:
    """Run the passes of ``rows`` that apply to ``plan`` on ``model``, in place."""
    for row in rows:
        if row.applies(plan):
            row.make(plan)(model)
