"""Graph passes for padding on the left, which Hugging Face's tokenizers use for Gemma.

GroupQueryAttention takes rows that start with a token: it knows a row's length, and appends to each
row at its own end. In float32, a row that is padded on the left therefore runs rotated, with its
padding at the end, and its hidden states are rotated back before the head. Its keys lie at the
start of the cache like those of any other row, so positions and windows are exact, and steps of one
token need no rotation at all. (Masking the padding with ``attention_bias`` instead takes memory
for every pair of tokens.) In half precision, where each node of the rotation would be a CUDA kernel
in every step, such a row gets NaN instead of plausible but wrong logits.

Shapes: B batch rows, T new tokens, S all tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

__all__ = ["AcceptLeftPadding", "ExpectRightPadding", "RejectLeftPadding"]

PREFIX = "left_padding"
ROTATIONS = ("rotate_tokens", "rotate_back")  # the nodes whose output is their input, rotated
# ONNX Runtime names the node that fails, and this one fails for masks that it cannot rotate.
GUARD = "padding_must_come_before_all_tokens_of_a_row_and_end_within_its_first_step"


class AcceptLeftPadding(ir.passes.InPlacePass):
    """Pass that lets a graph with fused attention take rows that are padded on the left.

    The graph then fails, rather than computing something else, for rows with padding both before
    and between tokens, and for rows whose first token comes in a later step than the row's start.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the rotation of the tokens before all nodes, and its inverse before the head."""
        graph = model.graph
        input_ids, attention_mask = graph.inputs[:2]
        (kept,) = (node for node in graph if node.op_type == "Slice")  # see SliceLastTokens
        hidden = kept.inputs[0]
        assert hidden is not None
        nodes = RotationNodes(graph)
        shift, new = nodes.shift(input_ids, attention_mask)
        start, end = nodes.constant("start", 0), nodes.add("Squeeze", "end", [new])
        steps = nodes.add("Range", "steps", [start, end, nodes.constant("step", 1)])
        readers = [use for use in input_ids.uses() if use.node.op_type != "Shape"]
        indices = nodes.add("Add", "to", [steps, shift])
        rotated = nodes.rotate("rotate_tokens", input_ids, indices, new)
        for node, index in readers:
            node.replace_input_with(index, rotated)
        graph.insert_before(graph[0], nodes.nodes)

        nodes.nodes = []
        indices = nodes.add("Sub", "from", [steps, shift])
        restored = nodes.rotate("rotate_back", hidden, indices, new)
        graph.insert_before(kept, nodes.nodes)
        kept.replace_input_with(0, restored)
        return ir.passes.PassResult(model, modified=True)


class ExpectRightPadding(ir.passes.InPlacePass):
    """Pass that undoes :class:`AcceptLeftPadding`, for a caller that pads on the right only."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Bypass the rotations and remove what only they need."""
        names = [f"{PREFIX}.{name}" for name in ROTATIONS]
        rotations = [node for node in model.graph if node.name in names]
        for node in rotations:
            original = node.inputs[0]
            assert original is not None
            node.outputs[0].replace_all_uses_with(original)
        if rotations:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(rotations))


class RejectLeftPadding(ir.passes.InPlacePass):
    """Pass that makes all logits of a row NaN if the row begins with padding.

    The scale of the embeddings is read from a table by the row's first mask value, which costs two
    small kernels in a step. (Nodes that make the session fail would have to run on the CPU, and a
    step that waits for the CPU cannot be captured as a CUDA graph.)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the constant scale of the embeddings by one for each row, [B, 1, 1]."""
        graph = model.graph
        input_ids, attention_mask = graph.inputs[:2]
        (multiply,) = (use.node for use in input_ids.uses() if use.node.op_type != "Shape")
        while multiply.op_type != "Mul":  # from the lookup to its scaling
            (multiply,) = (use.node for use in multiply.outputs[0].uses())
        scale = multiply.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        value = scale.const_value.numpy()
        nodes = InsertedNodes(graph)
        table = nodes.initializer("scale_table", np.array([np.nan, value.item()], value.dtype))
        first = nodes.add(
            "Gather", "first", [attention_mask, nodes.constant("zero", [[0]])], axis=1
        )
        multiply.replace_input_with(1, nodes.add("Gather", "scale", [table, first], axis=0))
        graph.insert_before(multiply, nodes.nodes)
        return ir.passes.PassResult(model, modified=True)


class InsertedNodes:
    """Makes nodes and initializers of the passes above, in order."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def add(
        self, operator: str, name: str, inputs: Sequence[ir.Value], **attributes: int
    ) -> ir.Value:
        """Append a node, and return its output."""
        name = f"{PREFIX}.{name}"
        node = ir.node(operator, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, value: int | list[int] | list[list[int]]) -> ir.Value:
        """Return a new int64 initializer."""
        return self.initializer(name, np.array(value, np.int64))

    def initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return a new initializer."""
        tensor = ir.tensor(array, name=f"{PREFIX}.{name}")
        initializer = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
        )
        initializer.const_value = tensor
        self.graph.register_initializer(initializer)
        return initializer


class RotationNodes(InsertedNodes):
    """Makes the nodes that :class:`AcceptLeftPadding` inserts, in order."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self.zero, self.one = self.constant("zero", [0]), self.constant("one", [1])
        self.last_axis = self.constant("last_axis", [-1])

    def shift(self, input_ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return how far each row is rotated, [B, 1], and the number T of new tokens, [1]."""
        add = self.add
        total = add("Shape", "total", [mask], start=1, end=2)
        new = add("Shape", "new", [input_ids], start=1, end=2)
        past = add("Sub", "past", [total, new])
        # ONNX Runtime has no int64 kernel for ArgMax everywhere.
        narrow = add("Cast", "mask", [mask], to=ir.DataType.INT32.value)
        padding = add("ArgMax", "padding", [narrow], axis=1, keepdims=1)
        shift = add("Max", "shift", [add("Sub", "unseen", [padding, past]), self.zero])
        count = add("ReduceSum", "count", [mask, self.one], keepdims=1)
        gaps = add("Sub", "gaps", [add("Sub", "from_first", [total, padding]), count])
        is_left = add("Min", "is_left", [padding, self.one])
        misplaced = add("Mul", "misplaced", [is_left, gaps])
        late = add("Mul", "late", [shift, past])
        problems = add("Add", "problems", [misplaced, late])
        # The index 0 is the only one within the table.
        checked = add("Gather", GUARD, [self.zero, problems], axis=0)
        return add("Add", "checked_shift", [shift, checked]), new

    def rotate(self, name: str, x: ir.Value, indices: ir.Value, new: ir.Value) -> ir.Value:
        """Return x [B, T, ...] with the tokens ``indices`` [B, T], modulo T."""
        wrapped = self.add("Mod", f"{name}.wrapped", [indices, new])
        column = self.add("Unsqueeze", f"{name}.column", [wrapped, self.last_axis])
        rotated = self.add("GatherND", name, [x, column], batch_dims=1)
        rotated.type = x.type
        return rotated
