"""The graphs that fill the cache with a prompt, in products that suit many tokens.

``MatMulNBits`` is made for decoding: it reads each block once and rounds activations in the same
blocks. With hundreds of tokens, one scale per row of activations and per column of weights is
several times faster, in ``MatMulIntegerToFloat``. Gemma's outliers would ruin such scales, so a
Hadamard matrix spreads them first, as :mod:`gemma3_export.exporters.onnx.integer_products` does for
browsers.

A prompt's logits follow from its last token, which runs in the graph for decoding. So these graphs
end with the keys and values of the last layer: they have neither a head nor what comes before it.
Inputs and caches are those of the graphs that they are made from, and so are norms and embedding,
which they read from the same file.

Shapes: B batch rows, T new tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

from gemma3_export.bundle import (
    CODES,
    SCALES,
    BlockFormat,
    PrefillGraph,
    Signature,
    StoredTensor,
    WeightRecipe,
    column_tensors,
)
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.external_data import (
    HashingWriter,
    OnWrite,
    attach,
    raw_bytes,
)
from gemma3_export.exporters.onnx.integer_products import (
    LARGEST_CODE,
    LEAST_ROTATION,
    SMALLEST_SCALE,
    shared_constant,
)
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.reference.weights.block_matrix import BlockMatrix, hadamard, quantize

__all__ = ["column_bytes", "write_prefill_graphs"]

DOMAIN = "com.microsoft"
FLOAT, INT8, UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8
ZERO_POINT = 128  # of activations


def write_prefill_graphs(
    path: Path,
    windowed: Path | None,
    recipes: Mapping[str, WeightRecipe],
    source: WeightSource,
    signature: Signature,
    on_write: OnWrite,
) -> tuple[PrefillGraph, dict[Path, str]]:
    """Write the graphs for prompts of a variant, and the file of their weights.

    Args:
        path: the variant's graph, already written.
        windowed: the same with sliding-window caches, if there is one.
        recipes: those of the variant's weights.
        source: the canonical weights.
        signature: the interface of ``path``.
        on_write: called with the number of bytes of each write.

    Returns:
        The record for the manifest, with paths relative to the bundle, and the SHA-256 of the file
        of weights.

    Raises:
        InputError: a matrix cannot be rotated, or a weight holds NaN or infinity.
        OSError: the disk is full.
    """
    data = path.with_name(f"{path.stem}_prefill.onnx_data")
    weights: dict[str, WeightRecipe] = {}
    stored: dict[str, tuple[StoredTensor, int]] = {}  # and the offset
    digest = ""
    written: list[str | None] = [None, None]
    for index, original in enumerate((path, windowed)):
        if original is None:
            continue
        model = ir.load(original)
        EndWithCache(signature)(model)
        if not stored:
            weights = dict(prefill_recipes(model.graph, recipes, source.config))
            stored, digest = write_columns(weights, source, data, on_write)
        UseColumnProducts(weights, source.config)(model)
        for name, (spec, offset) in stored.items():
            attach(model.graph.initializers[name], spec, offset, data)
        target = original.with_name(f"{original.stem}_prefill.onnx")
        ir.save(model, target)
        written[index] = f"{path.parent.name}/{target.name}"
    assert written[0] is not None
    return PrefillGraph(path=written[0], windowed_path=written[1], weights=weights), {data: digest}


def column_bytes(config: Gemma3Config) -> int:
    """Return about how much space the weights of the graphs for prompts need."""
    shapes = [shape for name, shape in config.weight_shapes() if is_projection(name, shape)]
    return sum(rows * columns + 4 * rows for rows, columns in shapes)


def is_projection(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a canonical weight is a matrix of a layer."""
    return len(shape) == 2 and name.startswith("model.layers.")


def prefill_recipes(
    graph: ir.Graph, recipes: Mapping[str, WeightRecipe], config: Gemma3Config
) -> Iterator[tuple[str, WeightRecipe]]:
    """Yield the matrices whose products ``graph`` still has, in their format for prompts.

    Raises:
        InputError: a matrix cannot be rotated.
    """
    shapes = dict(config.weight_shapes())
    for name, recipe in recipes.items():
        if recipe.blocks is None or f"{name}.{CODES}" not in graph.initializers:
            continue
        first = recipe.names[0]
        if not is_projection(first, shapes[first]):
            continue
        columns = shapes[first][1]
        blocks = BlockFormat.rotated_rows(columns, 32)
        if blocks.rotation < LEAST_ROTATION:
            raise InputError(
                f"{name} has {columns} columns, not a multiple of {LEAST_ROTATION}, so a graph for "
                "prompts would be inaccurate; omit --prefill-graph"
            )
        yield name, replace(recipe, blocks=blocks)


def write_columns(
    weights: Mapping[str, WeightRecipe], source: WeightSource, path: Path, on_write: OnWrite
) -> tuple[dict[str, tuple[StoredTensor, int]], str]:
    """Quantize and write the matrices; return each tensor with its offset, and the SHA-256.

    Raises:
        InputError: a weight holds NaN or infinity.
    """
    stored: dict[str, tuple[StoredTensor, int]] = {}
    with path.open("wb") as file:
        writer = HashingWriter(file, on_write)
        for name, recipe in weights.items():
            assert recipe.blocks is not None
            parts = []
            for canonical in recipe.names:
                for chunk in source.chunks(canonical):
                    check_finite(canonical, chunk)
                    parts.append(quantize(chunk, recipe.blocks))
            matrix = BlockMatrix.stack(parts)
            del parts
            specs = column_tensors(name, *matrix.codes.shape)
            codes = (matrix.codes.T.to(torch.int16) - recipe.blocks.zero_point).to(torch.int8)
            tensors = {CODES: codes.contiguous(), SCALES: matrix.scales[:, 0].contiguous()}
            for key, spec in specs.items():
                writer.align()
                stored[spec.name] = spec, writer.position
                writer.write(raw_bytes(tensors[key]))
    return stored, writer.digest.hexdigest()


class EndWithCache(ir.passes.InPlacePass):
    """Pass that removes the logits, and all that only they need.

    Args:
        signature: the interface of the graph.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Keep token ids, mask and cache as inputs, and the cache as outputs."""
        graph = model.graph
        optional = {spec.name for spec in self.signature.inputs if spec.optional}
        kept = {spec.name for spec in self.signature.present}
        for value in [value for value in graph.outputs if value.name not in kept]:
            graph.outputs.remove(value)
        for value in [value for value in graph.inputs if value.name in optional]:
            graph.inputs.remove(value)
        common.RemoveUnusedNodesPass()(model)
        for name in optional:
            graph.initializers.pop(name, None)
        return ir.passes.PassResult(model, modified=True)


class UseColumnProducts(ir.passes.InPlacePass):
    """Pass that replaces ``MatMulNBits`` with products of rotated, rounded rows.

    Args:
        weights: the matrices to replace, in their format for prompts.
        config: the model.
    """

    def __init__(self, weights: Mapping[str, WeightRecipe], config: Gemma3Config) -> None:
        self.weights = {f"{name}.{CODES}": (name, recipe) for name, recipe in weights.items()}
        self.shapes = dict(config.weight_shapes())

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every product of the matrices; the new initializers have no values yet."""
        graph = model.graph
        for node in tuple(graph):
            if node.op_type != "MatMulNBits" or (codes := node.inputs[1]) is None:
                continue
            if codes.name in self.weights:
                name, recipe = self.weights[codes.name]
                assert recipe.blocks is not None
                rows = sum(self.shapes[part][0] for part in recipe.names)
                ColumnProduct(graph, node, name, rows, recipe.blocks).insert()
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)


class ColumnProduct:
    """The nodes of one product, in place of one ``MatMulNBits``."""

    def __init__(
        self, graph: ir.Graph, old: ir.Node, name: str, rows: int, blocks: BlockFormat
    ) -> None:
        self.graph, self.old, self.blocks = graph, old, blocks
        self.columns = blocks.block_size  # K: there is one scale per row of weights
        self.tensors = {
            key: self._initializer(spec)
            for key, spec in column_tensors(name, rows, self.columns).items()
        }

    def insert(self) -> None:
        """Insert the nodes; the readers of the old product read the new one."""
        x = self.old.inputs[0]
        assert x is not None
        size = self.blocks.rotation
        blocks = self._constant(f"blocks_{size}", [0, 0, -1, size])
        split = self._node("Reshape", [x, blocks], "split")
        matrix = self._constant(f"hadamard_{size}", hadamard(size).float().numpy())
        mixed = self._node("MatMul", [split, matrix], "rotate")
        whole = self._constant(f"whole_{self.columns}", [0, 0, self.columns])
        rotated = self._node("Reshape", [mixed, whole], "merge")
        scale = self._row_scale(rotated)
        rounded = self._node("Round", [self._node("Div", [rotated, scale], "ratio")], "round")
        zero = self._constant("zero", np.array(ZERO_POINT, np.float32))
        shifted = self._node("Add", [rounded, zero], "shift")
        codes = self._node("Cast", [shifted], "codes", kind=UINT8, to=UINT8.value)
        inputs = [
            codes,
            self.tensors[CODES],
            scale,
            self.tensors[SCALES],
            self._constant("code_of_zero", np.array(ZERO_POINT, np.uint8)),
        ]  # no zero point of weights: ONNX Runtime fails where it makes unsigned ones of a shared 0
        product = self._node("MatMulIntegerToFloat", inputs, "product", domain=DOMAIN)
        self.old.outputs[0].replace_all_uses_with(product)
        self.graph.remove(self.old, safe=True)

    def _row_scale(self, x: ir.Value) -> ir.Value:
        """Return the scale of each token, [B, T, 1]."""
        size = self._node("Abs", [x], "size")
        largest = self._node("ReduceMax", [size, self._constant("last", [-1])], "max", keepdims=1)
        code = self._constant("largest_code", np.array(LARGEST_CODE, np.float32))
        least = self._constant("smallest_scale", np.array(SMALLEST_SCALE, np.float32))
        return self._node("Max", [self._node("Div", [largest, code], "scale"), least], "positive")

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        role: str,
        *,
        domain: str = "",
        kind: ir.DataType = FLOAT,
        **attributes: int,
    ) -> ir.Value:
        """Insert a node; return its output."""
        node = ir.Node(
            domain,
            op_type,
            inputs,
            [ir.AttrInt64(name, value) for name, value in attributes.items()],
            num_outputs=1,
            name=f"{self.old.name}.{role}",
        )
        output = node.outputs[0]
        output.name = f"{self.old.outputs[0].name}.{role}"
        output.type = ir.TensorType(kind)
        self.graph.insert_before(self.old, node)
        return output

    def _initializer(self, spec: StoredTensor) -> ir.Value:
        """Add an initializer without a value."""
        value = ir.Value(name=spec.name, shape=ir.Shape(spec.shape))
        self.graph.initializers[spec.name] = value
        return value

    def _constant(self, name: str, value: np.ndarray | list[int]) -> ir.Value:
        """Return an initializer that all products share, added on first use."""
        array = np.array(value, np.int64) if isinstance(value, list) else value
        return shared_constant(self.graph, f"prefill.{name}", array)
