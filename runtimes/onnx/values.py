"""ONNX Runtime's tensors in numpy's terms, bfloat16 included, which numpy does not have."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.runtimes.onnx.session import import_onnxruntime

__all__ = ["ONNX_BFLOAT16", "as_float32", "run_graph", "widened", "zeros"]

ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def zeros(shape: Sequence[int], dtype: str) -> Any:
    """An OrtValue on the CPU."""
    ort = import_onnxruntime()
    if dtype == "bfloat16":
        bits = np.zeros(shape, np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))


def run_graph(session: Any, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
    """What ``session.run`` does, for values of every type: OrtValues on the CPU.

    Args:
        session: of any graph.
        outputs: names.
        feeds: arrays or OrtValues by the inputs' names.
    """
    ort = import_onnxruntime()
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in feeds.items()
    }
    found: list[Any] = session.run_with_ort_values(list(outputs), values)
    return found


def as_float32(value: Any) -> NDArray[np.float32]:
    """A copy of an OrtValue on the CPU."""
    if value.element_type() != ONNX_BFLOAT16:
        array: NDArray[np.float32] = value.numpy().astype(np.float32)
        return array
    count = int(np.prod(value.shape()))
    if not count:  # nothing lies at its address
        return np.zeros(value.shape(), np.float32)
    bits = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return widened(np.ctypeslib.as_array(bits).reshape(value.shape()))


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Numbers in bfloat16, which is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
