"""Stream weights into an ONNX graph's external data file.

Each tensor is read, converted, written, hashed and released. Peak memory is that of the largest
tensor, or of one chunk if the tensor needs no rearranging, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch

from gemma3_export.bundle import (
    CODES,
    LOOKUP_SCALES,
    MINIMUMS,
    SCALES,
    SMOOTHING,
    StoredTensor,
    WeightRecipe,
    block_tensors,
)
from gemma3_export.dtypes import ELEMENT_TYPES, DType, torch_dtype
from gemma3_export.exporters.quantize.quantizers import Quantizer
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.reference.weights.block_matrix import pack_codes, signed_codes

__all__ = ["ALIGNMENT_BYTES", "write_external_data"]

ALIGNMENT_BYTES = 4096  # tensors start on a page boundary, so that runtimes can map them
CHUNK_BYTES = 64 * 2**20

OnWrite = Callable[[int], None]  # called with the number of bytes just written


class HashingWriter:
    """A binary file and its SHA-256, written in one pass."""

    def __init__(self, file: BinaryIO, on_write: OnWrite | None) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.position = 0
        self.on_write = on_write

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)
        if self.on_write is not None:
            self.on_write(len(data))

    def align(self) -> None:
        """Pad with zeros to the next page boundary."""
        padding = -self.position % ALIGNMENT_BYTES
        self.file.write(bytes(padding))
        self.digest.update(bytes(padding))
        self.position += padding


def write_external_data(
    graph: ir.Graph,
    recipes: Mapping[str, WeightRecipe],
    source: WeightSource,
    path: Path,
    *,
    dtype: DType = "float32",
    quantizer: Quantizer | None = None,
    on_write: OnWrite | None = None,
) -> str:
    """Write the graph's weights from ``source`` to ``path``, and attach them.

    Args:
        graph: its initializers named in ``recipes`` have no value; they will refer to the file.
        recipes: how to make each stored tensor from canonical weights.
        source: the canonical weights.
        path: the external data file, in the graph's folder.
        dtype: element type of matrices on disk; vectors (the norm weights) stay float32.
        quantizer: makes the blocks of quantized matrices; required if any recipe has blocks.
        on_write: called with the number of bytes of each write.

    Returns:
        The file's SHA-256.

    Raises:
        InputError: a weight holds NaN or infinity.
        OSError: the disk is full.
    """
    shapes = dict(source.config.weight_shapes())
    with path.open("wb") as file:
        writer = HashingWriter(file, on_write)
        for name, recipe in recipes.items():
            if recipe.blocks is not None:
                assert quantizer is not None
                write_blocks(writer, graph, name, recipe, quantizer, path)
                continue
            writer.align()
            start = writer.position
            is_vector = len(shapes[recipe.names[0]]) == 1
            stored: DType = "float32" if is_vector else dtype
            shape = write_tensor(writer, recipe, source, torch_dtype(stored))
            attach(graph.initializers[name], StoredTensor(name, shape, stored), start, path)
    return writer.digest.hexdigest()


def write_tensor(
    writer: HashingWriter, recipe: WeightRecipe, source: WeightSource, dtype: torch.dtype
) -> tuple[int, ...]:
    """Write one stored tensor; return its shape."""
    if recipe.transposed:
        parts = [read_checked(source, name, dtype) for name in recipe.names]
        tensor = torch.cat(parts).T.contiguous()
        del parts
        writer.write(raw_bytes(tensor))
        return tuple(tensor.shape)
    rows, trailing = 0, tuple[int, ...]()
    for name in recipe.names:
        for chunk in source.chunks(name, max_bytes=CHUNK_BYTES):
            check_finite(name, chunk)
            writer.write(raw_bytes(chunk.to(dtype).contiguous()))
            rows, trailing = rows + chunk.shape[0], tuple(chunk.shape[1:])
    return (rows, *trailing)


def write_blocks(
    writer: HashingWriter,
    graph: ir.Graph,
    name: str,
    recipe: WeightRecipe,
    quantizer: Quantizer,
    path: Path,
) -> None:
    """Write one quantized matrix: codes as they are made, then scales and minimums.

    Transposed codes are held until all rows are made, in one byte per weight.
    """
    writer.align()
    transposed: torch.Tensor | None = None
    if recipe.transposed:
        shape = graph.initializers[f"{name}.{CODES}"].shape
        assert shape is not None
        transposed = torch.empty(shape.numpy(), dtype=torch.int8)
    rows = 0
    offsets = {CODES: writer.position}
    collected: dict[str, list[torch.Tensor]] = {CODES: [], SCALES: [], MINIMUMS: []}
    for matrix in quantizer.matrices(recipe):
        if transposed is None:
            writer.write(raw_bytes(pack_codes(matrix)))
        else:
            transposed[:, rows : rows + len(matrix.codes)] = signed_codes(matrix).T
        rows += len(matrix.codes)
        collected[SCALES].append(matrix.scales)
        if matrix.smoothing is not None:
            collected[SMOOTHING] = [matrix.smoothing]
        if matrix.minimums is not None:
            collected[MINIMUMS].append(matrix.minimums)
    if transposed is not None:
        writer.write(raw_bytes(transposed))
    assert recipe.blocks is not None
    columns = collected[SCALES][0].shape[1] * recipe.blocks.block_size
    tensors = block_tensors(name, recipe.blocks, rows, columns, transposed=recipe.transposed)
    for key, spec in tensors.items():
        if key == CODES:
            continue
        writer.align()
        offsets[key] = writer.position
        if key in collected:
            tensor = torch.cat(collected[key])
        else:
            tensor = torch.zeros(spec.shape, dtype=torch.uint8)  # zero points
        if key == SCALES:
            tensor = tensor.to(torch_dtype(recipe.blocks.scale_type))
            check_finite(f"{name}.{key} in {recipe.blocks.scale_type}", tensor)
        writer.write(raw_bytes(tensor.contiguous()))
    for key, spec in tensors.items():
        attach(graph.initializers[spec.name], spec, offsets[key], path)
    alias = graph.initializers.get(f"{name}.{LOOKUP_SCALES}")
    if alias is not None:
        scales = tensors[SCALES]
        attach(
            alias,
            StoredTensor(str(alias.name), (*scales.shape, 1), scales.dtype),
            offsets[SCALES],
            path,
        )


def attach(value: ir.Value, spec: StoredTensor, offset: int, path: Path) -> None:
    """Make an initializer refer to the external data at ``offset``, in bytes."""
    kind = ELEMENT_TYPES[spec.dtype]
    value.const_value = ir.ExternalTensor(
        location=path.name,
        offset=offset,
        length=math.prod(spec.shape) * kind.size_bytes,
        dtype=ir.DataType(kind.onnx),
        shape=ir.Shape(spec.shape),
        name=spec.name,
        base_dir=path.parent,
    )
    value.shape = ir.Shape(spec.shape)
    value.type = ir.TensorType(ir.DataType(kind.onnx))


def read_checked(source: WeightSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return one whole canonical weight in ``dtype``, checked to be finite."""
    tensor = source.read(name)
    check_finite(name, tensor)
    return tensor.to(dtype)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's memory, without a copy."""
    # Flat, because a single column counts as contiguous whatever its stride.
    return tensor.reshape(-1).view(torch.uint8).numpy().data
