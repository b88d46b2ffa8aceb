"""Put quantised matrices in the place of float ones in a traced graph.

The graph is rewritten after tracing, so that one model definition serves every format and each
matrix may have its own: ``MatMul`` and ``Gemm`` become ``MatMulNBits``, the embedding's ``Gather``
becomes ``GatherBlockQuantized``. The tied embedding stays one tensor.

Where activations are half, so are the scales, and the kernels multiply as they are: rounding the
inputs to int8 is for the CPU. Minimums stay float32, and so does what is subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from gemma3_export.bundle import (
    CODES,
    LOOKUP_SCALES,
    MINIMUMS,
    SCALES,
    ZERO_POINTS,
    BlockFormat,
    BlockTensor,
    WeightRecipe,
    block_tensors,
)
from gemma3_export.dtypes import ELEMENT_TYPES

__all__ = ["quantize_graph"]

DOMAIN = "com.microsoft"
FLOAT = ir.DataType.FLOAT
# MatMulNBits' accuracy_level: take the inputs as they are, or round them to int8 by block as well.
PLAIN_ACTIVATIONS, INT8_ACTIVATIONS = 0, 4


def quantize_graph(
    graph: ir.Graph,
    recipes: Mapping[str, WeightRecipe],
    formats: Mapping[str, BlockFormat],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, WeightRecipe]:
    """Rewrite every use of the matrices in ``formats``.

    Args:
        graph: weights are initializers without a value.
        recipes: how each stored tensor is made of canonical weights.
        formats: stored tensor to its new format.
        shapes: stored tensor to its [rows, columns], output-major.

    Returns:
        The new recipes.
    """
    for name, block_format in formats.items():
        value = graph.initializers[name]
        matrix = StoredMatrix(graph, name, block_format, *shapes[name])
        for node, _ in tuple(value.uses()):
            if node.op_type == "Gather":
                matrix.replace_lookup(node)
            else:
                assert node.op_type in {"MatMul", "Gemm"}, node.op_type
                matrix.replace_product(node)
        del graph.initializers[name]
    return {
        name: replace(recipe, transposed=False, blocks=formats[name]) if name in formats else recipe
        for name, recipe in recipes.items()
    }


class StoredMatrix:
    """The initializers of one quantised matrix, and the nodes that use it."""

    def __init__(
        self, graph: ir.Graph, name: str, block_format: BlockFormat, rows: int, columns: int
    ) -> None:
        self.graph, self.name, self.format = graph, name, block_format
        self.rows, self.columns = rows, columns
        self.is_wide = block_format.scale_type == "float32"
        self.scale_type = ir.DataType(ELEMENT_TYPES[block_format.scale_type].onnx)
        self.parts: dict[str, ir.Value] = {}
        for key, part in block_tensors(name, block_format, rows, columns).items():
            self.parts[key] = self._initializer(part)

    def _initializer(self, part: BlockTensor) -> ir.Value:
        value = ir.Value(
            name=part.name,
            type=ir.TensorType(ir.DataType(ELEMENT_TYPES[part.dtype].onnx)),
            shape=ir.Shape(part.shape),
        )
        self.graph.initializers[part.name] = value
        return value

    def replace_product(self, old: ir.Node) -> None:
        """``MatMul(x, W)`` or ``Gemm(x, W)`` to ``MatMulNBits``, less ``sums(x) @ minimums``."""
        x = old.inputs[0]
        assert x is not None
        inputs = [x, self.parts[CODES], self.parts[SCALES], self.parts.get(ZERO_POINTS)]
        attributes = {
            "K": self.columns,
            "N": self.rows,
            "bits": self.format.bits,
            "block_size": self.format.block_size,
            "accuracy_level": INT8_ACTIVATIONS if self.is_wide else PLAIN_ACTIVATIONS,
        }
        product = self._insert(old, DOMAIN, "MatMulNBits", inputs, attributes)
        if self.format.has_minimum:
            sums = self._block_sums(old, self._widened(old, x, "input"))
            inputs = [sums, self.parts[MINIMUMS]]
            offset = self._insert(old, DOMAIN, "FusedMatMul", inputs, {"transB": 1}, FLOAT)
            product = self._less(old, product, offset)
        self._take_over(old, product)

    def _less(self, old: ir.Node, value: ir.Value, offset: ir.Value) -> ir.Value:
        """``value - offset`` in the type of ``value``, computed in float32."""
        wide = self._widened(old, value, "minuend")
        difference = self._insert(old, "", "Sub", [wide, offset], kind=FLOAT)
        if self.is_wide:
            return difference
        return self._cast(old, difference, self.scale_type, "difference")

    def _widened(self, old: ir.Node, value: ir.Value, role: str) -> ir.Value:
        """``value`` in float32."""
        return value if self.is_wide else self._cast(old, value, FLOAT, role)

    def _cast(self, old: ir.Node, value: ir.Value, kind: ir.DataType, role: str) -> ir.Value:
        return self._insert(old, "", "Cast", [value], {"to": kind.value}, kind, role)

    def _block_sums(self, old: ir.Node, x: ir.Value) -> ir.Value:
        """[..., K] to [..., G]: what each block's minimum is multiplied with."""
        blocks = [0, 0, -1, self.format.block_size]  # Gemm's input has two axes, MatMul's three
        if old.op_type == "Gemm":
            del blocks[0]
        target = self._integers(old, "blocks", blocks)
        split = self._insert(old, "", "Reshape", [x, target], kind=FLOAT)
        axis = self._integers(old, "axis", [-1])
        return self._insert(old, "", "ReduceSum", [split, axis], {"keepdims": 0}, FLOAT)

    def replace_lookup(self, old: ir.Node) -> None:
        """``Gather(W, ids)`` to ``GatherBlockQuantized``."""
        ids = old.inputs[1]
        assert ids is not None
        scales = self.parts[SCALES]
        assert scales.shape is not None
        shape = (*scales.shape.numpy(), 1)
        alias = self._initializer(
            BlockTensor(f"{self.name}.{LOOKUP_SCALES}", shape, self.format.scale_type)
        )
        attributes = {
            "bits": self.format.bits,
            "block_size": self.format.block_size,
            "gather_axis": 0,
            "quantize_axis": 2,
        }
        assert ZERO_POINTS not in self.parts, "lookup tables are widened to 8 bits first"
        inputs = [self.parts[CODES], ids, alias]
        found = self._insert(old, DOMAIN, "GatherBlockQuantized", inputs, attributes)
        if self.format.has_minimum:
            low = self._insert(old, "", "Gather", [self.parts[MINIMUMS], ids], {"axis": 0}, FLOAT)
            axis = self._integers(old, "axis", [-1])
            low = self._insert(old, "", "Unsqueeze", [low, axis], kind=FLOAT)
            found = self._less(old, found, low)
        row = self._integers(old, "row", [0, 0, self.columns])
        self._take_over(old, self._insert(old, "", "Reshape", [found, row]))

    def _insert(
        self,
        before: ir.Node,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int] | None = None,
        kind: ir.DataType | None = None,  # None: as what is replaced
        role: str = "",  # where an operator stands twice
    ) -> ir.Value:
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = ir.Node(
            domain,
            op_type,
            inputs,
            [ir.AttrInt64(name, value) for name, value in (attributes or {}).items()],
            num_outputs=1,
            name=f"{before.name}.{role}{op_type}",
        )
        output = node.outputs[0]
        output.name = f"{before.outputs[0].name}.{role}{op_type}"
        output.type = before.outputs[0].type if kind is None else ir.TensorType(kind)
        self.graph.insert_before(before, node)
        return output

    def _integers(self, node: ir.Node, role: str, values: Sequence[int]) -> ir.Value:
        name = f"{self.name}.{node.op_type}.{role}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(list(values), dtype=ir.DataType.INT64, name=name)
            self.graph.initializers[name] = ir.Value(
                name=name,
                const_value=tensor,
                type=ir.TensorType(ir.DataType.INT64),
                shape=ir.Shape((len(values),)),
            )
        return self.graph.initializers[name]

    def _take_over(self, old: ir.Node, new: ir.Value) -> None:
        old.outputs[0].replace_all_uses_with(new)
        self.graph.remove(old, safe=True)
