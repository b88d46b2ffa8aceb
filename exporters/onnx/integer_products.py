"""8-bit products in standard operators, for onnxruntime-web.

Its WebAssembly has no fast kernel for ``MatMulNBits`` with 8 bits, but it has one for
``MatMulInteger``. That product knows one scale per row only, which Gemma's outliers would ruin:
rounding the 270M by rows and columns costs a KLD of 0.04 nats per token. A Hadamard matrix over 32
consecutive inputs spreads the outliers first, for weights at export and for activations in the
graph, and the cost falls to 0.005.

The weights are the *left* operand, ``W @ x.T``. They stay as they are stored, so the tied embedding
is read in place by lookup and head alike: no transposed copy, no packed copy.

Shapes: B batch rows, T new tokens, K inputs, N outputs. ``Gemm``, the head, has no B.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemma3_export.bundle import CODES, SCALES, BlockFormat
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.quantize_weights import FLOAT, MatrixNodes
from gemma3_export.reference.weights.block_matrix import hadamard

__all__ = [
    "LARGEST_CODE",
    "LEAST_ROTATION",
    "SMALLEST_SCALE",
    "IntegerProducts",
    "rotated_rows",
    "shared_constant",
]

INT32, UINT8 = ir.DataType.INT32, ir.DataType.UINT8
LEAST_ROTATION = 16  # of published sizes, every matrix has 32
LARGEST_CODE = 127.0
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # rows of zeros must not divide by zero


def rotated_rows(name: str, columns: int) -> BlockFormat:
    """Return the format of a matrix with ``columns`` inputs.

    Raises:
        InputError: the inputs cannot be rotated.
    """
    found = BlockFormat.rotated_rows(columns)
    if found.rotation < LEAST_ROTATION:
        raise InputError(
            f"{name} has {columns} columns, not a multiple of {LEAST_ROTATION}, so int8 for "
            "browsers would be inaccurate; choose --dtype fp32"
        )
    return found


class IntegerProducts(MatrixNodes):
    """Products of 8-bit weights with activations that are rounded to 8 bits, one scale per row."""

    def replace_product(self, old: ir.Node) -> None:
        """Replace ``MatMul(x, W)`` or ``Gemm(x, W)`` with the transpose of ``W @ x.T``."""
        x = old.inputs[0]
        assert x is not None
        swap = {"perm": [1, 0] if old.op_type == "Gemm" else [0, 2, 1]}
        rotated = self._rotate(old, x, 1 if old.op_type == "Gemm" else 2)
        scale = self._row_scale(old, rotated)
        ratio = self.insert(old, "", "Div", [rotated, scale], kind=FLOAT)
        rounded = self.insert(old, "", "Round", [ratio], kind=FLOAT)
        # Unsigned as the weights are: on x86 without VNNI, ONNX Runtime adds products of unsigned
        # and signed bytes in 16 bits, where they saturate.
        shifted = self.insert(old, "", "Add", [rounded, self._shift()], kind=FLOAT)
        codes = self.insert(old, "", "Cast", [shifted], {"to": UINT8.value}, UINT8, "code")
        columns = self.insert(old, "", "Transpose", [codes], swap, UINT8, "code")
        inputs = [self.tensors[CODES], columns, self._zero_point(), self._zero_point()]
        product = self.insert(old, "", "MatMulInteger", inputs, kind=INT32)
        product = self.insert(old, "", "Cast", [product], {"to": FLOAT.value}, FLOAT, "product")
        product = self.insert(
            old, "", "Mul", [product, self.tensors[SCALES]], kind=FLOAT, role="weight"
        )
        product = self.insert(old, "", "Transpose", [product], swap, FLOAT, "product")
        self.take_over(old, self.insert(old, "", "Mul", [product, scale], role="input"))

    def replace_lookup(self, old: ir.Node) -> None:
        """Replace ``Gather(W, ids)`` with the lookup of a row and its scale."""
        ids = old.inputs[1]
        assert ids is not None
        codes = self.insert(old, "", "Gather", [self.tensors[CODES], ids], {"axis": 0}, role="code")
        codes.type = ir.TensorType(ir.DataType.UINT8)
        wide = self.insert(old, "", "Cast", [codes], {"to": FLOAT.value}, FLOAT)
        centered = self.insert(old, "", "Sub", [wide, self._shift()], kind=FLOAT)
        scales = self.insert(
            old, "", "Gather", [self.tensors[SCALES], ids], {"axis": 0}, FLOAT, "scale"
        )
        row = self.insert(old, "", "Mul", [centered, scales], kind=FLOAT)
        self.take_over(old, self._rotate(old, row, 2))

    def _rotate(self, old: ir.Node, x: ir.Value, leading: int) -> ir.Value:
        """Return ``x`` [..., K], with ``leading`` other axes, rotated."""
        size = self.format.rotation
        blocks = self.integers(old, "blocks", [*[0] * leading, -1, size])
        whole = self.integers(old, "whole", [*[0] * leading, self.columns])
        split = self.insert(old, "", "Reshape", [x, blocks], kind=FLOAT, role="split")
        matrix = self._constant(f"hadamard_{size}", hadamard(size).float().numpy())
        mixed = self.insert(old, "", "MatMul", [split, matrix], kind=FLOAT, role="rotate")
        return self.insert(old, "", "Reshape", [mixed, whole], kind=FLOAT, role="merge")

    def _row_scale(self, old: ir.Node, x: ir.Value) -> ir.Value:
        """Return the scale of each row of ``x``, [..., 1]."""
        size = self.insert(old, "", "Abs", [x], kind=FLOAT)
        last = self.integers(old, "last", [-1])
        largest = self.insert(old, "", "ReduceMax", [size, last], {"keepdims": 1}, FLOAT)
        code = self._number("largest_code", LARGEST_CODE)
        scale = self.insert(old, "", "Div", [largest, code], kind=FLOAT, role="scale")
        least = self._number("smallest_scale", SMALLEST_SCALE)
        return self.insert(old, "", "Max", [scale, least], kind=FLOAT)

    def _shift(self) -> ir.Value:
        return self._number("zero_point", float(self.format.zero_point))

    def _zero_point(self) -> ir.Value:
        return self._constant("code_of_zero", np.array(self.format.zero_point, np.uint8))

    def _number(self, name: str, value: float) -> ir.Value:
        return self._constant(name, np.array(value, np.float32))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return shared_constant(self.graph, f"integer_products.{name}", array)


def shared_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return an initializer that all matrices share, added on first use."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )
    return graph.initializers[name]
