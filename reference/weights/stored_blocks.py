"""Read a quantised matrix back out of an ONNX graph's initializers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from gemma3_export.bundle.block_format import BlockFormat
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.blocks import CODES, MINIMUMS, SCALES, stored_parts
from gemma3_export.reference.weights.block_matrix import BlockMatrix, unpack_codes

__all__ = ["StoredBlocks"]


class StoredBlocks:
    """One quantised matrix of a graph, mapped from its file.

    Raises:
        InputError: parts are missing, or do not have the shapes of the format.
    """

    def __init__(
        self, initializers: Mapping[str, ir.Value], name: str, block_format: BlockFormat
    ) -> None:
        keys = (CODES, SCALES, MINIMUMS) if block_format.has_minimum else (CODES, SCALES)
        self.format = block_format
        self.parts = {key: tensor_of(initializers, f"{name}.{key}") for key in keys}
        rows, blocks = self.parts[SCALES].shape.numpy()[:2]
        self.shape = (rows, blocks * block_format.block_size)
        expected = stored_parts(name, block_format, *self.shape)
        for key, tensor in self.parts.items():
            if tuple(tensor.shape) != expected[key].shape:
                raise InputError(
                    f"the graph stores {name}.{key} as {list(tensor.shape)}, but its format "
                    f"({block_format}) needs {list(expected[key].shape)}; export the bundle anew"
                )

    def blocks(self, start: int, stop: int) -> BlockMatrix:
        """Rows [start, stop) as they are stored."""
        part = {key: read_rows(tensor, start, stop) for key, tensor in self.parts.items()}
        codes = unpack_codes(part[CODES], self.format)
        return BlockMatrix(self.format, codes, part[SCALES].float(), part.get(MINIMUMS))


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a stored tensor, copied."""
    rows = np.array(tensor.numpy()[start:stop])
    if tensor.dtype == ir.DataType.BFLOAT16:  # which torch does not take from numpy
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


def tensor_of(initializers: Mapping[str, ir.Value], name: str) -> ir.TensorProtocol:
    """The stored tensor ``name``.

    Raises:
        InputError: there is none of two axes or three.
    """
    value = initializers.get(name)
    if value is None or value.const_value is None or len(value.const_value.shape) not in (2, 3):
        raise InputError(f"the graph lacks {name}, which its manifest names; export it anew")
    return value.const_value
