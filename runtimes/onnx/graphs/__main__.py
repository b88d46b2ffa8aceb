"""Write the small graphs: ``python -m gemma3_export.runtimes.onnx.graphs``."""

from __future__ import annotations

import onnx
from onnx import parser

from gemma3_export.runtimes.onnx.graphs import (
    COPY_GRAPH,
    PREPARATION_GRAPH,
    PRODUCT_GRAPH,
    SELECTION_GRAPH,
)

__all__ = ["GRAPHS", "written"]

# In opset 21, which every ONNX Runtime that this project accepts has kernels for.
HEADER = '<ir_version: 10, opset_import: ["": 21], producer_name: "gemma3-export">'
GRAPHS = {
    PREPARATION_GRAPH: """
preparation (int64[B, 2] state, int64[1, C] columns)
    => (int64[B, 1] input_ids, int64[B, C] attention_mask)
    <int64[2] parts = {1, 1}> {
    input_ids, length = Split <axis: int = 1> (state, parts)
    held = Less (columns, length)
    attention_mask = Cast <to: int = 7> (held)
}
""",
    COPY_GRAPH: """
copy (uint8[n] source) => (uint8[n] target) {
    target = Identity (source)
}
""",
    SELECTION_GRAPH: """
selection (float[B, 1, V] logits, int64[1] count) => (float[B, 1, N] packed)
    <int64[1] axis = {-1}> {
    values, wide = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (logits, count)
    ids = Cast <to: int = 1> (wide)
    total = ReduceSum <keepdims: int = 1> (logits, axis)
    packed = Concat <axis: int = -1> (values, ids, total)
}
""",
    PRODUCT_GRAPH: """
trial (float[2, 2] left, float[2, 2] right) => (float[2, 2] product) {
    product = MatMul (left, right)
}
""",
}


def written(text: str) -> bytes:
    """Return one graph as its file contains it."""
    model = parser.parse_model(HEADER + text)
    onnx.checker.check_model(model, full_check=True)
    serialized: bytes = model.SerializeToString()
    return serialized


if __name__ == "__main__":
    for path, text in GRAPHS.items():
        path.write_bytes(written(text))
