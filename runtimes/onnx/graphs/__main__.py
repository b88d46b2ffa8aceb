"""Write the small graphs: ``python -m gemma3_export.runtimes.onnx.graphs``."""

from __future__ import annotations

import onnx
from onnx import parser

from gemma3_export.runtimes.onnx.graphs import (
    BLOCK_SELECTION_GRAPH,
    COPY_GRAPH,
    GREEDY_GRAPH,
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
    GREEDY_GRAPH: """
greedy (float[B, 1, V] logits, int64[B, 2] state, int64[1, C] columns)
    => (float[B, 1, 3] packed, int64[B, 2] next_state, int64[B, 1] input_ids,
        int64[B, C] attention_mask)
    <int64[2] parts = {1, 1}, int64[1] axis = {-1}, int64[1] one = {1}, int64[2] flat = {0, -1}> {
    best = ArgMax <axis: int = -1, keepdims: int = 1> (logits)
    value = GatherElements <axis: int = -1> (logits, best)
    id = Cast <to: int = 1> (best)
    total = ReduceSum <keepdims: int = 1> (logits, axis)
    packed = Concat <axis: int = -1> (value, id, total)
    token, length = Split <axis: int = 1> (state, parts)
    next_length = Add (length, one)
    next_token = Reshape (best, flat)
    next_state = Concat <axis: int = 1> (next_token, next_length)
    input_ids = Identity (next_token)
    held = Less (columns, next_length)
    attention_mask = Cast <to: int = 7> (held)
}
""",
    BLOCK_SELECTION_GRAPH: """
block_selection (float[B, 1, V] logits, int64[1] count, float[C, W] columns)
    => (float[B, 1, N] packed)
    <int64[1] axis = {-1}, int64[1] one = {1}, int64[2] flat = {0, -1}, int64[3] row = {0, 1, -1}> {
    whole = Shape <start: int = 0, end: int = 1> (logits)
    size = Shape (columns)
    blocked = Concat <axis: int = 0> (whole, size)
    blocks = Reshape (logits, blocked)
    largest = ReduceMax <keepdims: int = 0> (blocks, axis)
    unsorted, at = TopK <axis: int = -1, largest: int = 1, sorted: int = 0> (largest, count)
    deeper = Unsqueeze (at, axis)
    chosen = GatherND <batch_dims: int = 1> (blocks, deeper)
    ids = Gather <axis: int = 0> (columns, at)
    chosen_row = Reshape (chosen, row)
    ids_row = Reshape (ids, row)
    values, where = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (chosen_row, count)
    tokens = GatherElements <axis: int = -1> (ids_row, where)
    total = ReduceSum <keepdims: int = 1> (logits, axis)
    packed = Concat <axis: int = -1> (values, tokens, total)
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
