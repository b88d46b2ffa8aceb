"""Count the bytes of an ONNX model's weights that one decode step reads; needs onnx."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

__all__ = ["bytes_per_token"]


def bytes_per_token(path: Path) -> int:
    """Add up all weights except those that are only indexed: embeddings and RoPE tables."""
    graph = onnx.load(path, load_external_data=False).graph
    read = {
        name
        for node in graph.node
        if not node.op_type.startswith(("Gather", "GroupQueryAttention"))
        for name in node.input
    }
    return sum(
        math.ceil(math.prod(tensor.dims) * bits(tensor.data_type) / 8)
        for tensor in graph.initializer
        if tensor.name in read
    )


def bits(data_type: int) -> int:
    """Return the bits per element."""
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8
