"""Trace a stand-in model into an ONNX graph with no weights in memory.

torch.export runs under fake tensors, so a 27B model traces as cheaply as a tiny one of its depth;
the weights are attached afterwards (:mod:`gemma3_export.exporters.onnx.external_data`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import rewriter
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma3_export.bundle import MODEL_PREFIX, Signature, TensorSpec, WeightRecipe
from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import ELEMENT_TYPES
from gemma3_export.exporters.decoder_step import DecoderStep, example_inputs
from gemma3_export.exporters.onnx.modules import FusedGemma3, PortableGemma3
from gemma3_export.exporters.onnx.stack_layers import one_layer_of_each_kind, stack_layers
from gemma3_export.exporters.packed_projections import weight_recipes

__all__ = ["OPSET_VERSION", "TARGETS", "declare_signature", "trace_onnx"]

OPSET_VERSION = 23  # the first with Attention and RMSNormalization
FOLD_LIMIT_BYTES = 4096  # constants up to this size are computed now, larger ones on load
TARGETS: dict[str, type[PortableGemma3]] = {"ort": FusedGemma3, "portable": PortableGemma3}


def trace_onnx(
    config: Gemma3Config,
    signature: Signature,
    target: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[ir.Model, dict[str, WeightRecipe]]:
    """The graph of one decoder step, and how to fill its weights.

    Args:
        config: the model.
        signature: names, types and axes of the graph's inputs and outputs.
        target: ``ort`` for ONNX Runtime's fused kernels, ``portable`` for standard operators.
        dtype: element type of matrices, attention and what passes between them.

    Returns:
        The graph, whose weights are initializers without a value, and the recipe of each.
    """
    kinds = one_layer_of_each_kind(config)
    shallow = replace(config, num_hidden_layers=len(kinds), layer_types=kinds)
    shallow_signature = Signature.of(shallow, cache_dtype=signature.past_keys[0].dtype)
    with quiet_exporter(), FakeTensorMode():
        recipes = weight_recipes(TARGETS[target](config))
        decoder = TARGETS[target](shallow)
        decoder.round_matrices(dtype)
        step = DecoderStep(decoder).eval().requires_grad_(False)
        program = torch.onnx.export(
            export_program(step, shallow, dtype),
            dynamo=True,
            opset_version=OPSET_VERSION,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in shallow_signature.inputs],
            output_names=[spec.name for spec in shallow_signature.outputs],
        )
    assert program is not None
    model = program.model
    detach_weights(model.graph, weight_recipes(step.decoder))
    optimize(model)
    stack_layers(model.graph, config, signature)
    declare_signature(model.graph, signature)
    assert recipes.keys() <= model.graph.initializers.keys()
    model.producer_name, model.producer_version = "gemma3-export", None
    return model, recipes


def export_program(
    step: nn.Module, config: Gemma3Config, cache_dtype: torch.dtype
) -> torch.export.ExportedProgram:
    """torch.export of ``step`` with batch, new and past lengths dynamic."""
    dim = torch.export.Dim
    batch, new, past = dim("batch_size"), dim("sequence_length"), dim("past_sequence_length")
    cache = {0: batch, 2: past}
    count = 2 * config.num_hidden_layers
    return torch.export.export(
        step,
        example_inputs(config, dtype=cache_dtype),
        dynamic_shapes=(
            {0: batch, 1: new},
            {0: batch, 1: dim.DYNAMIC},
            [cache] * count,
            None,
        ),
        strict=False,
    )


def detach_weights(graph: ir.Graph, recipes: dict[str, WeightRecipe]) -> None:
    """Give the weights their canonical names and drop their fake values."""
    prefix = f"{MODEL_PREFIX}."
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = value.name.removeprefix(prefix)
        if name in recipes:
            value.name = name
            value.const_value = None
    missing = recipes.keys() - graph.initializers.keys()
    assert not missing, f"the trace lost {sorted(missing)}"


def optimize(model: ir.Model) -> None:
    """Fold shape arithmetic and constants, and leave nothing that only the tracer needs.

    Traces carry stack traces with the paths of this machine, which do not belong in a bundle.
    """
    passes = ir.passes.Sequential(
        common_passes.InlinePass(),
        ir.passes.PassManager(
            [
                FoldConstantsPass(
                    shape_inference=False,
                    input_size_limit=FOLD_LIMIT_BYTES,
                    output_size_limit=FOLD_LIMIT_BYTES,
                ),
                rewriter.RewritePass(rewriter._DEFAULT_REWRITE_RULES),
                common_passes.RemoveUnusedNodesPass(),
                common_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
                common_passes.RemoveUnusedOpsetsPass(),
            ],
            steps=2,
        ),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
        common_passes.ClearMetadataAndDocStringPass(),
    )
    passes(model)
    for node in model.graph:
        for output in node.outputs:
            output.shape = None  # the trace claims T where the head sees fewer tokens


def declare_signature(graph: ir.Graph, signature: Signature) -> None:
    """Write the signature's types and axis names on the graph's inputs and outputs."""
    for value, spec in zip(graph.inputs, signature.inputs, strict=True):
        declare(value, spec)
        if spec.optional:  # an input with an initializer may be left out by the caller
            value.const_value = ir.tensor([0], dtype=ir.DataType.INT64, name=spec.name)
            graph.register_initializer(value)
    for value, spec in zip(graph.outputs, signature.outputs, strict=True):
        declare(value, spec)


def declare(value: ir.Value, spec: TensorSpec) -> None:
    """Set one value's name, type and axes."""
    assert value.name == spec.name, f"traced {value.name} where {spec.name} belongs"
    value.type = ir.TensorType(ir.DataType(ELEMENT_TYPES[spec.dtype].onnx))
    value.shape = ir.Shape(spec.axes)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about packages that this project does not use."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
