"""8-bit products of rotated rows: one scale per row of activations and per output of weights.

Such products are fast, but Gemma's outliers would ruin them: rounding the 270M in this way costs a
KLD of 0.04 nats per token. A Hadamard matrix over consecutive inputs spreads the outliers first,
for weights at export and for activations in the graph.

:class:`ColumnProducts` is for ONNX Runtime on the CPU. Its ``MatMulIntegerToFloat`` reads a matrix
once per call, however many rows there are, so one graph serves prompts and decoding.

:class:`IntegerProducts` is for onnxruntime-web, in standard operators. Its WebAssembly has no fast
kernel for ``MatMulNBits`` with 8 bits, but it has one for ``MatMulInteger``. There the weights are
the *left* operand, ``W @ x.T``. They stay as they are stored, so the tied embedding is read in
place by lookup and head alike: no transposed copy, no packed copy.

Shapes: B batch rows, T new tokens, K inputs, N outputs. ``Gemm``, the head, has no B.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemma3_export.bundle import CODES, MAX_ROTATION, SCALES, SMOOTHING, BlockFormat
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.quantize_weights import DOMAIN, FLOAT, MatrixNodes
from gemma3_export.reference.weights.block_matrix import hadamard

__all__ = [
    "ColumnProducts",
    "IntegerProducts",
    "rotated_rows",
]

INT8, INT32, INT64, UINT8 = (
    ir.DataType.INT8,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.UINT8,
)
LEAST_ROTATION = 16  # every matrix of the published sizes has 64
# KLD 0.0054 on the 270M; 64 gives 0.0049 at twice the cost
WEB_ROTATION = 32
LARGEST_CODE = 127.0
ZERO_POINTS = "integer_products.zero_points"  # the node that all layers share
# The input of a node that scales its output by channel.
SCALE_INPUTS = {
    "RMSNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
    "MatMulIntegerToFloat": 3,
}
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # rows of zeros must not divide by zero


def rotated_rows(name: str, columns: int, target: str) -> BlockFormat:
    """Return the format of a matrix with ``columns`` inputs.

    Raises:
        InputError: the inputs cannot be rotated.
    """
    largest = WEB_ROTATION if target == "web" else MAX_ROTATION
    found = BlockFormat.rotated_rows(columns, largest)
    if found.rotation < LEAST_ROTATION:
        raise InputError(
            f"{name} has {columns} columns, not a multiple of {LEAST_ROTATION}, so 8 bits with one "
            "scale per row would be inaccurate; choose --dtype fp32"
        )
    return found


class RotatedProducts(MatrixNodes):
    """The nodes that rotate activations, and that compute the scale of each row."""

    def rotate(self, old: ir.Node, x: ir.Value, leading: int) -> ir.Value:
        """Return ``x`` [..., K], with ``leading`` other axes, rotated."""
        size = self.format.rotation
        # without -1, which cannot be inferred where there are no tokens
        blocks = self.integers(old, "blocks", [*[0] * leading, self.columns // size, size])
        whole = self.integers(old, "whole", [*[0] * leading, self.columns])
        split = self.insert(old, "", "Reshape", [x, blocks], kind=FLOAT, role="split")
        matrix = self.constant(f"hadamard_{size}", hadamard(size).float().numpy())
        mixed = self.insert(old, "", "MatMul", [split, matrix], kind=FLOAT, role="rotate")
        return self.insert(old, "", "Reshape", [mixed, whole], kind=FLOAT, role="merge")

    def row_scale(self, old: ir.Node, x: ir.Value) -> ir.Value:
        """Return the scale of each row of ``x``, [..., 1]; rows of zeros have 0."""
        size = self.insert(old, "", "Abs", [x], kind=FLOAT)
        last = self.integers(old, "last", [-1])
        largest = self.insert(old, "", "ReduceMax", [size, last], {"keepdims": 1}, FLOAT)
        code = self.number("largest_code", LARGEST_CODE)
        return self.insert(old, "", "Div", [largest, code], kind=FLOAT, role="scale")

    def shift(self) -> ir.Value:
        """Return the code that means zero, float32."""
        return self.number("zero_point", float(self.format.zero_point))

    def zero_point(self) -> ir.Value:
        """Return the code that means zero, uint8."""
        return self.constant("code_of_zero", np.array(self.format.zero_point, np.uint8))

    def number(self, name: str, value: float) -> ir.Value:
        """Return a float32 number that all matrices share."""
        return self.constant(name, np.array(value, np.float32))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return an initializer that all matrices share, added on first use."""
        name = f"integer_products.{name}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            self.graph.initializers[name] = ir.Value(
                name=name,
                const_value=tensor,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
            )
        return self.graph.initializers[name]


class ColumnProducts(RotatedProducts):
    """Products in ``MatMulIntegerToFloat``, whose weights are stored inputs first, [K, N]."""

    def replace_product(self, old: ir.Node) -> None:
        """Replace ``MatMul(x, W)``, or ``Gemm`` with the reshapes around it, which copy logits."""
        x, is_head = old.inputs[0], old.op_type == "Gemm"
        assert x is not None
        if is_head:
            x = producer(x, "Reshape").inputs[0]
            assert x is not None
            (old,) = old.outputs[0].consumers()
            assert old.op_type == "Reshape"
        if self.format.is_smoothed:
            self._smooth(x)
        rotated = self.rotate(old, x, 2)
        scale = self.row_scale(old, rotated)
        codes = self._rounded_rows(old, rotated, scale, self._zero_points(old, x, is_head=is_head))
        # Without a zero point of weights: ONNX Runtime fails where it makes a shared one unsigned.
        inputs = [codes, self.tensors[CODES], scale, self.tensors[SCALES], self.zero_point()]
        self.take_over(old, self.insert(old, DOMAIN, "MatMulIntegerToFloat", inputs))

    def _rounded_rows(
        self, old: ir.Node, x: ir.Value, scale: ir.Value, zeros: ir.Value
    ) -> ir.Value:
        """Return the codes [B, T, K] uint8 of ``x``, whose rows have a scale and a zero point each.

        One node rounds each row as a block. The codes of a row of zeros are not defined, but they
        are multiplied by its scale, which is 0.
        """
        attributes = {"axis": -1, "block_size": self.columns}
        return self.insert(old, "", "QuantizeLinear", [x, scale, zeros], attributes, UINT8)

    def _zero_points(self, old: ir.Node, x: ir.Value, *, is_head: bool) -> ir.Value:
        """Return the code that means zero for each row, [B, T, 1] uint8; all layers share them.

        The head has other rows: those of the wanted logits.
        """
        if not is_head:
            for node in self.graph:
                if node.name == ZERO_POINTS:
                    return node.outputs[0]
        sizes = self.insert(old, "", "Shape", [x], {"end": 2}, INT64)
        one = self.constant("one", np.array([1], np.int64))
        shape = self.insert(old, "", "Concat", [sizes, one], {"axis": 0}, INT64, "shape")
        zeros = self.insert(old, "", "Expand", [self.zero_point(), shape], kind=UINT8)
        if not is_head:
            expanded = zeros.producer()
            assert expanded is not None
            expanded.name = ZERO_POINTS
        return zeros

    def _smooth(self, x: ir.Value) -> None:
        """Divide what scales ``x`` by the factors of its channels; both are constants."""
        factors = self.tensors[SMOOTHING]
        node = producer(x, "Mul", *SCALE_INPUTS)
        if node.op_type == "Mul":  # GELU of one half of a product, times the other half
            node = producer(producer(node.inputs[1], "Split").inputs[0], "MatMulIntegerToFloat")
            ones = self.constant(f"ones_{self.columns}", np.ones(self.columns, np.float32))
            factors = self.insert(node, "", "Concat", [ones, factors], {"axis": 0}, FLOAT)
        index = SCALE_INPUTS[node.op_type]
        inputs = [node.inputs[index], factors]
        node.replace_input_with(index, self.insert(node, "", "Div", inputs, None, FLOAT, "smooth"))

    def replace_lookup(self, old: ir.Node) -> None:
        """Replace ``Gather(W, ids)`` with the lookup of a column and its scale."""
        ids = old.inputs[1]
        codes = self.insert(
            old, "", "Gather", [self.tensors[CODES], ids], {"axis": 1}, INT8, "code"
        )
        wide = self.insert(old, "", "Cast", [codes], {"to": FLOAT.value}, FLOAT)
        scales = self.insert(
            old, "", "Gather", [self.tensors[SCALES], ids], kind=FLOAT, role="scale"
        )
        columns = self.insert(old, "", "Mul", [wide, scales], kind=FLOAT)  # [K, B, T]
        rows = self.insert(old, "", "Transpose", [columns], {"perm": [1, 2, 0]}, FLOAT)
        self.take_over(old, self.rotate(old, rows, 2))


class IntegerProducts(RotatedProducts):
    """Products in standard operators, whose weights are stored outputs first, [N, K]."""

    def replace_product(self, old: ir.Node) -> None:
        """Replace ``MatMul(x, W)`` or ``Gemm(x, W)`` with the transpose of ``W @ x.T``."""
        x = old.inputs[0]
        assert x is not None
        swap = {"perm": [1, 0] if old.op_type == "Gemm" else [0, 2, 1]}
        codes, scale = self._rounded_rows(old, x, 1 if old.op_type == "Gemm" else 2)
        columns = self.insert(old, "", "Transpose", [codes], swap, UINT8, "code")
        inputs = [self.tensors[CODES], columns, self.zero_point(), self.zero_point()]
        product = self.insert(old, "", "MatMulInteger", inputs, kind=INT32)
        product = self.insert(old, "", "Cast", [product], {"to": FLOAT.value}, FLOAT, "product")
        product = self.insert(
            old, "", "Mul", [product, self.tensors[SCALES]], kind=FLOAT, role="weight"
        )
        product = self.insert(old, "", "Transpose", [product], swap, FLOAT, "product")
        self.take_over(old, self.insert(old, "", "Mul", [product, scale], role="input"))

    def _rounded_rows(self, old: ir.Node, x: ir.Value, leading: int) -> tuple[ir.Value, ir.Value]:
        """Return the codes [..., K] uint8 and scales [..., 1] of ``x``, rotated.

        Codes are unsigned as the weights are: on x86 without VNNI, ONNX Runtime adds products of
        unsigned and signed bytes in 16 bits, where they saturate.

        Args:
            old: the node to insert before.
            x: the activations [..., K].
            leading: number of other axes.
        """
        rotated = self.rotate(old, x, leading)
        least = self.number("smallest_scale", SMALLEST_SCALE)
        scale = self.insert(old, "", "Max", [self.row_scale(old, rotated), least], kind=FLOAT)
        ratio = self.insert(old, "", "Div", [rotated, scale], kind=FLOAT)
        rounded = self.insert(old, "", "Round", [ratio], kind=FLOAT)
        shifted = self.insert(old, "", "Add", [rounded, self.shift()], kind=FLOAT)
        codes = self.insert(old, "", "Cast", [shifted], {"to": UINT8.value}, UINT8, "code")
        return codes, scale

    def replace_lookup(self, old: ir.Node) -> None:
        """Replace ``Gather(W, ids)`` with the lookup of a row and its scale."""
        ids = old.inputs[1]
        codes = self.insert(
            old, "", "Gather", [self.tensors[CODES], ids], {"axis": 0}, UINT8, "code"
        )
        wide = self.insert(old, "", "Cast", [codes], {"to": FLOAT.value}, FLOAT)
        centered = self.insert(old, "", "Sub", [wide, self.shift()], kind=FLOAT)
        scales = self.insert(
            old, "", "Gather", [self.tensors[SCALES], ids], {"axis": 0}, FLOAT, "scale"
        )
        row = self.insert(old, "", "Mul", [centered, scales], kind=FLOAT)
        self.take_over(old, self.rotate(old, row, 2))


def producer(value: ir.Value | None, *op_types: str) -> ir.Node:
    """Return the node that computes ``value``, which has one of these types."""
    node = None if value is None else value.producer()
    assert node is not None
    assert node.op_type in op_types, node.op_type
    return node
