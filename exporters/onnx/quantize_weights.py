"""A graph pass that replaces float matrices with integers.

Quantizing after the trace lets one model definition serve every format, and lets every matrix have
a format of its own. :class:`BlockProducts` turns ``MatMul`` and ``Gemm`` into ``MatMulNBits``, and
the embedding's ``Gather`` into ``GatherBlockQuantized``; for ``w8a8`` and browsers, see
:mod:`gemma3_export.exporters.onnx.integer_products`. The tied embedding remains one tensor.

With half-precision activations the scales are half precision too, and the kernels use their inputs
as they are; rounding inputs to int8 is a CPU technique. Block minimums, and the terms computed from
them, stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from gemma3_export.bundle import (
    CODES,
    LOOKUP_SCALES,
    MINIMUMS,
    SCALES,
    ZERO_POINTS,
    BlockFormat,
    StoredTensor,
    WeightRecipe,
    block_tensors,
)
from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import ELEMENT_TYPES, DType
from gemma3_export.exporters.quantize.quantizers import Quantizer

__all__ = [
    "BlockProducts",
    "MatrixNodes",
    "QuantizeWeights",
    "QuantizedShape",
    "quantized_recipes",
    "quantized_shapes",
]

DOMAIN = "com.microsoft"
FLOAT = ir.DataType.FLOAT
# MatMulNBits' accuracy_level: use the inputs as they are, or round them to int8 blocks first.
PLAIN_ACTIVATIONS, INT8_ACTIVATIONS = 0, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedShape:
    """Format and output-major shape of one quantized matrix."""

    format: BlockFormat
    rows: int
    columns: int
    transposed: bool = False  # stored inputs first


def quantized_shapes(
    recipes: Mapping[str, WeightRecipe],
    quantizer: Quantizer,
    config: Gemma3Config,
    scale_type: DType,
    *,
    transposed: bool = False,
) -> dict[str, QuantizedShape]:
    """Return the stored matrices that ``quantizer`` quantizes, by name.

    Scales take ``scale_type``, the type of the graph's activations, whatever type the quantizer
    computed them in. ``transposed`` stores them inputs first.
    """
    canonical = dict(config.weight_shapes())
    found: dict[str, QuantizedShape] = {}
    for name, recipe in recipes.items():
        if len(canonical[recipe.names[0]]) != 2:
            continue
        block_format = quantizer.format(recipe.names)
        if block_format is not None:
            found[name] = QuantizedShape(
                format=replace(block_format, scale_type=scale_type),
                rows=sum(canonical[part][0] for part in recipe.names),
                columns=canonical[recipe.names[0]][1],
                transposed=transposed,
            )
    return found


def quantized_recipes(
    recipes: Mapping[str, WeightRecipe], matrices: Mapping[str, QuantizedShape]
) -> dict[str, WeightRecipe]:
    """Return ``recipes`` with the formats of the quantized matrices."""
    return {
        name: replace(recipe, transposed=matrices[name].transposed, blocks=matrices[name].format)
        if name in matrices
        else recipe
        for name, recipe in recipes.items()
    }


def make_attribute(name: str, value: int | Sequence[int]) -> ir.Attr:
    """Return an integer attribute, or one with several integers."""
    return ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrInt64s(name, value)


class QuantizeWeights(ir.passes.InPlacePass):
    """Pass that rewrites every use of the given matrices to read integers.

    The new initializers have no values yet.

    Args:
        matrices: initializer name to its new format and shape.
        kind: the nodes to use.
    """

    def __init__(
        self, matrices: Mapping[str, QuantizedShape], kind: type[MatrixNodes] | None = None
    ) -> None:
        self.matrices, self.kind = matrices, kind or BlockProducts

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each ``MatMul``, ``Gemm`` and ``Gather`` of the matrices."""
        graph = model.graph
        for name, shape in self.matrices.items():
            value = graph.initializers[name]
            matrix = self.kind(graph, name, shape)
            for node, _ in tuple(value.uses()):
                if node.op_type == "Gather":
                    matrix.replace_lookup(node)
                else:
                    assert node.op_type in {"MatMul", "Gemm"}, node.op_type
                    matrix.replace_product(node)
            del graph.initializers[name]
        return ir.passes.PassResult(model, bool(self.matrices))


class MatrixNodes:
    """The initializers of one quantized matrix, and the nodes that read it."""

    def __init__(self, graph: ir.Graph, name: str, shape: QuantizedShape) -> None:
        self.graph, self.name, self.format = graph, name, shape.format
        self.rows, self.columns = shape.rows, shape.columns
        self.is_float32 = shape.format.scale_type == "float32"
        self.scale_type = ir.DataType(ELEMENT_TYPES[shape.format.scale_type].onnx)
        self.tensors: dict[str, ir.Value] = {}
        stored = block_tensors(
            name, shape.format, shape.rows, shape.columns, transposed=shape.transposed
        )
        for key, tensor in stored.items():
            self.tensors[key] = self.initializer(tensor)

    def initializer(self, tensor: StoredTensor) -> ir.Value:
        """Add an initializer without a value."""
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(ir.DataType(ELEMENT_TYPES[tensor.dtype].onnx)),
            shape=ir.Shape(tensor.shape),
        )
        self.graph.initializers[tensor.name] = value
        return value

    def replace_product(self, old: ir.Node) -> None:
        """Replace ``MatMul(x, W)`` [B, T, K] or ``Gemm(x, W)`` [R, K]."""
        raise NotImplementedError

    def replace_lookup(self, old: ir.Node) -> None:
        """Replace ``Gather(W, ids)``."""
        raise NotImplementedError

    def insert(
        self,
        before: ir.Node,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | Sequence[int]] | None = None,
        kind: ir.DataType | None = None,  # None: the type of the node that is replaced
        role: str = "",  # distinguishes two nodes of one operator
    ) -> ir.Value:
        """Insert a node; return its output."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = ir.Node(
            domain,
            op_type,
            inputs,
            [make_attribute(name, value) for name, value in (attributes or {}).items()],
            num_outputs=1,
            name=f"{before.name}.{role}{op_type}",
        )
        output = node.outputs[0]
        output.name = f"{before.outputs[0].name}.{role}{op_type}"
        output.type = before.outputs[0].type if kind is None else ir.TensorType(kind)
        self.graph.insert_before(before, node)
        return output

    def integers(self, node: ir.Node, role: str, values: Sequence[int]) -> ir.Value:
        """Return an initializer [N] int64, added on first use."""
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

    def take_over(self, old: ir.Node, new: ir.Value) -> None:
        """Give the readers of ``old`` the value ``new``, and remove ``old``."""
        output = old.outputs[0]
        if output.is_graph_output():
            self.graph.outputs[self.graph.outputs.index(output)] = new
            new.name, output.name = output.name, None
            new.type, new.shape = output.type, output.shape
        output.replace_all_uses_with(new)
        self.graph.remove(old, safe=True)


class BlockProducts(MatrixNodes):
    """Products with blocks, in operators of ONNX Runtime; activations are rounded in blocks too."""

    def replace_product(self, old: ir.Node) -> None:
        """Replace ``MatMul(x, W)`` or ``Gemm(x, W)`` with ``MatMulNBits``.

        With minimums, subtract ``block_sums(x) @ minimums`` from the product.
        """
        x = old.inputs[0]
        assert x is not None
        inputs = [x, self.tensors[CODES], self.tensors[SCALES], self.tensors.get(ZERO_POINTS)]
        attributes = {
            "K": self.columns,
            "N": self.rows,
            "bits": self.format.bits,
            "block_size": self.format.block_size,
            "accuracy_level": INT8_ACTIVATIONS if self.is_float32 else PLAIN_ACTIVATIONS,
        }
        product = self.insert(old, DOMAIN, "MatMulNBits", inputs, attributes)
        if self.format.has_minimum:
            sums = self._block_sums(old, self._to_float32(old, x, "input"))
            inputs = [sums, self.tensors[MINIMUMS]]
            offset = self.insert(old, DOMAIN, "FusedMatMul", inputs, {"transB": 1}, FLOAT)
            product = self._subtract(old, product, offset)
        self.take_over(old, product)

    def replace_lookup(self, old: ir.Node) -> None:
        """Replace ``Gather(W, ids)`` with ``GatherBlockQuantized``."""
        ids = old.inputs[1]
        assert ids is not None
        scales = self.tensors[SCALES]
        assert scales.shape is not None
        shape = (*scales.shape.numpy(), 1)
        alias = self.initializer(
            StoredTensor(f"{self.name}.{LOOKUP_SCALES}", shape, self.format.scale_type)
        )
        attributes = {
            "bits": self.format.bits,
            "block_size": self.format.block_size,
            "gather_axis": 0,
            "quantize_axis": 2,
        }
        assert ZERO_POINTS not in self.tensors, "lookup tables are widened to 8 bits first"
        inputs = [self.tensors[CODES], ids, alias]
        found = self.insert(old, DOMAIN, "GatherBlockQuantized", inputs, attributes)
        if self.format.has_minimum:
            inputs = [self.tensors[MINIMUMS], ids]
            low = self.insert(old, "", "Gather", inputs, {"axis": 0}, FLOAT)
            axis = self.integers(old, "axis", [-1])
            low = self.insert(old, "", "Unsqueeze", [low, axis], kind=FLOAT)
            found = self._subtract(old, found, low)
        row = self.integers(old, "row", [0, 0, self.columns])
        self.take_over(old, self.insert(old, "", "Reshape", [found, row]))

    def _subtract(self, old: ir.Node, value: ir.Value, offset: ir.Value) -> ir.Value:
        """Return ``value - offset``, computed in float32, in the type of ``value``."""
        wide = self._to_float32(old, value, "minuend")
        difference = self.insert(old, "", "Sub", [wide, offset], kind=FLOAT)
        if self.is_float32:
            return difference
        return self._cast(old, difference, self.scale_type, "difference")

    def _to_float32(self, old: ir.Node, value: ir.Value, role: str) -> ir.Value:
        return value if self.is_float32 else self._cast(old, value, FLOAT, role)

    def _cast(self, old: ir.Node, value: ir.Value, kind: ir.DataType, role: str) -> ir.Value:
        return self.insert(old, "", "Cast", [value], {"to": kind.value}, kind, role)

    def _block_sums(self, old: ir.Node, x: ir.Value) -> ir.Value:
        """Return the sum of each block, [..., K] to [..., G]: the factors of the minimums."""
        size = self.format.block_size
        blocks = [0, 0, self.columns // size, size]  # Gemm's input has two axes, MatMul's three
        if old.op_type == "Gemm":
            del blocks[0]
        target = self.integers(old, "blocks", blocks)
        split = self.insert(old, "", "Reshape", [x, target], kind=FLOAT)
        axis = self.integers(old, "axis", [-1])
        return self.insert(old, "", "ReduceSum", [split, axis], {"keepdims": 0}, FLOAT)
