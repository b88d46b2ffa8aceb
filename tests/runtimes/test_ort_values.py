"""Values of every type pass through a graph, including types that numpy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from gemma3_export.runtimes.onnx.ort_values import as_float32, bfloat16_to_float32, run_graph, zeros

KINDS = {
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float16": onnx.TensorProto.FLOAT16,
    "float32": onnx.TensorProto.FLOAT,
}


def session_of(dtype: str) -> Any:
    """Return a graph that joins a float32 input and a past of ``dtype``, in ``dtype``."""
    name = "float" if dtype == "float32" else dtype
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        joined (float[a, 3] x, {name}[b, 3] past) => ({name}[c, 3] present) {{
            cast = Cast<to = {KINDS[dtype]}>(x)
            present = Concat<axis = 0>(past, cast)
        }}
    """
    model = onnx.parser.parse_model(text)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("dtype", KINDS)
def test_values_of_every_type_pass_through_a_graph(dtype: str) -> None:
    session = session_of(dtype)
    x = np.array([[1, -2, 0.5], [3, 256, -0.0078125]], np.float32)  # exact in every type
    empty = zeros((0, 3), dtype)
    (first,) = run_graph(session, ["present"], {"x": x, "past": empty})
    (second,) = run_graph(session, ["present"], {"x": x[:1], "past": first})
    found = as_float32(second)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x[[0, 1, 0]])
    del first, second
    np.testing.assert_array_equal(found, x[[0, 1, 0]], "a copy, not a view")
    assert as_float32(empty).shape == (0, 3)


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    np.testing.assert_array_equal(
        bfloat16_to_float32(np.array([0x3F80, 0xC000, 0x0000], np.uint16)),
        np.array([1, -2, 0], np.float32),
    )
