"""Graph passes that turn torch's trace into a graph for a bundle."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer, rewriter

from gemma3_export.bundle import Signature, TensorSpec
from gemma3_export.dtypes import ELEMENT_TYPES

__all__ = ["DeclareSignature", "DropTracedShapes", "Simplify"]

FOLD_LIMIT_BYTES = 4096  # fold constants up to this size now; runtimes fold larger ones on load
SIMPLIFY_ROUNDS = 2  # the first round exposes constants to the second


class Simplify(ir.passes.InPlacePass):
    """Pass that folds size arithmetic and constants, and removes what is then unused."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply onnxscript's constant folding and default rewrite rules."""
        for _ in range(SIMPLIFY_ROUNDS):
            optimizer.fold_constants(
                model,
                onnx_shape_inference=False,
                input_size_limit=FOLD_LIMIT_BYTES,
                output_size_limit=FOLD_LIMIT_BYTES,
            )
            rewriter.rewrite(model)
        return ir.passes.PassResult(model, modified=True)


class DropTracedShapes(ir.passes.InPlacePass):
    """Pass that forgets the shapes of intermediate values.

    The trace claims T tokens where the head sees fewer.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear the shape of every node output."""
        for node in model.graph:
            for output in node.outputs:
                output.shape = None
        return ir.passes.PassResult(model, modified=True)


class DeclareSignature(ir.passes.InPlacePass):
    """Pass that writes a signature's types and axis names on the graph's inputs and outputs.

    Args:
        signature: must list the graph's inputs and outputs by name, in order.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Declare every input and output, and give optional inputs their default."""
        graph = model.graph
        for value, spec in zip(graph.inputs, self.signature.inputs, strict=True):
            declare(value, spec)
            if spec.optional:  # callers may omit an input that has an initializer
                value.const_value = ir.tensor([0], dtype=ir.DataType.INT64, name=spec.name)
                graph.register_initializer(value)
        for value, spec in zip(graph.outputs, self.signature.outputs, strict=True):
            declare(value, spec)
        return ir.passes.PassResult(model, modified=True)


def declare(value: ir.Value, spec: TensorSpec) -> None:
    """Set type and axes of one input or output."""
    assert value.name == spec.name, f"the graph has {value.name} in place of {spec.name}"
    value.type = ir.TensorType(ir.DataType(ELEMENT_TYPES[spec.dtype].onnx))
    value.shape = ir.Shape(spec.axes)
