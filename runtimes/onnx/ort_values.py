"""Convert between numpy arrays and ONNX Runtime's OrtValues, bfloat16 included.

numpy has no bfloat16: such values are handled as the uint16 bits of their upper halves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.dtypes import ELEMENT_TYPES
from gemma3_export.runtimes.onnx.session import import_onnxruntime

__all__ = [
    "ONNX_BFLOAT16",
    "as_float32",
    "bfloat16_to_float32",
    "from_float32",
    "run_graph",
    "zeros",
]

ONNX_BFLOAT16 = ELEMENT_TYPES["bfloat16"].onnx


def zeros(shape: Sequence[int], dtype: str) -> Any:
    """Return an OrtValue of zeros on the CPU."""
    ort = import_onnxruntime()
    if dtype == "bfloat16":
        bits = np.zeros(shape, np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))


def from_float32(array: NDArray[np.float32], dtype: str) -> Any:
    """Return an OrtValue of ``dtype`` on the CPU; its numbers must be exact in that type."""
    ort = import_onnxruntime()
    if dtype == "bfloat16":
        bits = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype))


def run_graph(session: Any, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
    """Run a session on values of any type and return OrtValues on the CPU.

    Args:
        session: an ``InferenceSession`` of any graph.
        outputs: names of the outputs to compute.
        feeds: arrays or OrtValues by input name.
    """
    ort = import_onnxruntime()
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in feeds.items()
    }
    found: list[Any] = session.run_with_ort_values(list(outputs), values)
    return found


def as_float32(value: Any) -> NDArray[np.float32]:
    """Return a float32 copy of an OrtValue on the CPU."""
    if value.element_type() != ONNX_BFLOAT16:
        array: NDArray[np.float32] = value.numpy().astype(np.float32)
        return array
    count = int(np.prod(value.shape()))
    if not count:  # an empty value has no valid address
        return np.zeros(value.shape(), np.float32)
    bits = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return bfloat16_to_float32(np.ctypeslib.as_array(bits).reshape(value.shape()))


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 numbers, given as bits, as float32: they are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
