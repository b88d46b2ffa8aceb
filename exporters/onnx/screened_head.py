"""A language-model head that screens the vocabulary, for decoding: exact top-k logits.

The head is a model's largest matrix, but greedy and top-k decoding need only a handful of its
quarter million logits. So a copy of the head in 8-bit blocks screens the vocabulary first: it reads
a quarter of the bytes and, with a proven bound, finds the tokens that may be among the k largest.
Only their rows are then multiplied in float32.

For a hidden state h, a row w of the head and its 8-bit copy c, Cauchy-Schwarz gives

    |w.h - c.h| <= |w - c| |h|

The kernel rounds its inputs to 8-bit blocks. So h is split into g, which is on the grid that the
kernel rounds to, and a remainder r. The kernel multiplies g exactly, and its error on r is at most
|c| sqrt(D) max|r| / 254. The two bounds together are the margin of a row's logit around c.g + c.r.
A token is a candidate if its upper bound reaches the k-th largest lower bound.

If there are too many candidates, or none because numbers are not finite, the graph returns all
logits instead.

Shapes: B batch rows, T kept tokens, D hidden size, V vocabulary, G blocks, R screened rows,
N candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx import parser

from gemma3_export.bundle import CODES, SCALES, BlockFormat, StoredTensor, block_tensors
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.external_data import HashingWriter, OnWrite, attach, raw_bytes
from gemma3_export.reference.weights.block_matrix import pack_codes, quantize

__all__ = ["ScreenHead", "screen_bytes", "should_screen", "write_screen"]

NAME = "head_screen"
MARGINS = "margins"
MIN_HEAD_BYTES = 32 * 2**20  # in float32; screening a smaller head saves nothing
LIMIT_SHARE = 64  # with more candidates than this fraction of the vocabulary, return all logits
MIN_LIMIT = 256
CHUNK_BYTES = 64 * 2**20
BLOCK_SIZES = (128, 64, 32, 16)  # larger blocks have fewer scales to read
# Bound of the rounding in float32 sums of D products, as a fraction of D |h| |w|: twice the worst.
SUM_ERROR = 2.0**-23
LEVELS = 127  # on each side of zero, of the grid that the kernel rounds its inputs to
SLACK = 1.001  # keeps bounds valid although they are computed in float32

# The products of a state's two parts are R rows apart.
GRAPH = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
screen (
    float[B, T, D] hidden, int64[1] num_candidates, float[V, D] head,
    uint8[V, G, S] codes, float[V, G] scales, float[2, V] margins
) => (
    int64[N] candidate_rows, int64[N] candidate_ids, float[N] candidate_logits,
    float[B, A, D] others
)
<
    int64[1] zero = {0}, int64[1] one = {1}, int64[1] last = {-1}, int64[1] end = {LAST},
    int64[1] limit = {LIMIT}, int64[2] rows_shape = {-1, COLUMNS},
    int64[3] blocks_shape = {-1, BLOCKS, BLOCK_SIZE}, int64[3] halves_shape = {2, -1, ROWS},
    float tiny = {1e-30}, float levels = {LEVELS}, float doubt = {DOUBT}
>
{
    first_count = Min (num_candidates, one)
    first = Slice (hidden, zero, first_count, one)
    states = Reshape (first, rows_shape)
    blocks = Reshape (states, blocks_shape)
    sizes = Abs (blocks)
    largest = ReduceMax <keepdims: int = 1> (sizes, last)
    not_zero = Max (largest, tiny)
    grid = Div (not_zero, levels)
    in_grid = Div (blocks, grid)
    rounded = Round (in_grid)
    gridded = Mul (rounded, grid)
    on_grid = Reshape (gridded, rows_shape)
    rest = Sub (states, on_grid)
    both = Concat <axis: int = 0> (on_grid, rest)
    products = com.microsoft.MatMulNBits <
        K: int = COLUMNS, N: int = ROWS, bits: int = 8, block_size: int = BLOCK_SIZE,
        accuracy_level: int = 4
    > (both, codes, scales)
    halves = Reshape (products, halves_shape)
    screened = ReduceSum <keepdims: int = 0> (halves, zero)
    length = ReduceL2 <keepdims: int = 1> (states, last)
    rest_sizes = Abs (rest)
    rest_largest = ReduceMax <keepdims: int = 1> (rest_sizes, last)
    rest_error = Mul (rest_largest, doubt)
    errors = Concat <axis: int = 1> (length, rest_error)
    reach = MatMul (errors, margins)
    bottom = Sub (screened, reach)
    top = Add (screened, reach)
    count = Max (num_candidates, one)
    best, best_ids = TopK <axis: int = -1, sorted: int = 0> (bottom, count)
    bar = ReduceMin <keepdims: int = 1> (best, last)
    may_be = GreaterOrEqual (top, bar)
    found = NonZero (may_be)
    found_count = Shape <start: int = 1> (found)
    is_some = Greater (found_count, zero)
    is_few = LessOrEqual (found_count, limit)
    suffices = And (is_some, is_few)
    used_count = Where (suffices, found_count, zero)
    used = Slice (found, zero, used_count, one)
    row_part, id_part = Split <axis: int = 0, num_outputs: int = 2> (used)
    candidate_rows = Reshape (row_part, last)
    candidate_ids = Reshape (id_part, last)
    candidate_states = Gather <axis: int = 0> (states, candidate_rows)
    candidate_weights = Gather <axis: int = 0> (head, candidate_ids)
    terms = Mul (candidate_states, candidate_weights)
    candidate_logits = ReduceSum <keepdims: int = 0> (terms, last)
    others_count = Where (suffices, zero, end)
    others = Slice (hidden, zero, others_count, one)
}
"""


def should_screen(config: Gemma3Config, requested: bool | None) -> bool:
    """Return whether to screen a float32 head; by default, if the head is large.

    Raises:
        InputError: screening is requested, and no block size divides the hidden size.
    """
    size = block_size(config)
    if requested and not size:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise InputError(
            f"hidden_size {config.hidden_size} is not a multiple of any block size ({sizes}), so "
            "the head cannot be screened; omit --screen"
        )
    if requested is None:
        return bool(size) and 4 * config.vocab_size * config.hidden_size >= MIN_HEAD_BYTES
    return requested


def block_size(config: Gemma3Config) -> int:
    """Return how many columns of the copy share a scale; 0 if no size divides the hidden size."""
    return next((size for size in BLOCK_SIZES if config.hidden_size % size == 0), 0)


def screen_format(config: Gemma3Config) -> BlockFormat:
    """Return the block format of the copy."""
    return BlockFormat(bits=8, block_size=block_size(config))


def screen_bytes(config: Gemma3Config) -> int:
    """Return the size of the copy and its margins."""
    copy = screen_format(config).size_bytes(config.vocab_size, config.hidden_size)
    return copy + 2 * 4 * config.vocab_size


class ScreenHead(ir.passes.InPlacePass):
    """Pass that lets the graph return candidates if its new input ``num_candidates`` is not 0.

    ``candidate_rows``, ``candidate_ids`` and ``candidate_logits`` [N] then include the
    ``num_candidates`` largest logits of each row's first kept token, and ``logits`` is empty. With
    too many candidates it is the other way round.

    Activations and head must be float32. The new inputs and outputs have yet to be declared, and
    :func:`write_screen` attaches the new weights.

    Args:
        config: the model.
    """

    def __init__(self, config: Gemma3Config) -> None:
        self.config = config

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the screening subgraph before the head's ``Gemm``."""
        graph = model.graph
        head = graph.initializers[self.config.head_name]
        product = next(node for node, _ in head.uses() if node.op_type == "Gemm")
        rows = product.inputs[0]
        reshape = None if rows is None else rows.producer()
        hidden = None if reshape is None else reshape.inputs[0]
        assert hidden is not None
        screen = ir.from_proto(parser.parse_model(graph_text(self.config))).graph
        for node, index in tuple(hidden.uses()):
            node.replace_input_with(index, screen.outputs[-1])
        splice(graph, screen, {"hidden": hidden, "head": head})
        return ir.passes.PassResult(model, modified=True)


def splice(graph: ir.Graph, part: ir.Graph, given: dict[str, ir.Value]) -> None:
    """Move the nodes of ``part`` into ``graph``, after the node that makes the first ``given``.

    Integer inputs of ``part`` that are not given become inputs of ``graph``, other inputs become
    initializers; all outputs but the last become outputs.
    """
    nodes, constants = tuple(part), tuple(part.initializers.values())
    inputs, outputs = tuple(part.inputs), tuple(part.outputs[:-1])
    part.outputs.clear()
    part.inputs.clear()
    part.initializers.clear()
    part.remove(nodes)
    for value in inputs:
        if value.name in given:
            value.replace_all_uses_with(given[value.name])
        elif value.dtype == ir.DataType.INT64:
            graph.inputs.append(value)
        else:
            constants = (*constants, value)
    for value in (*constants, *(output for node in nodes for output in node.outputs)):
        if value not in outputs:
            value.name = f"{NAME}.{value.name}"
    for value in constants:
        graph.initializers[str(value.name)] = value
    for node in nodes:
        node.name = f"node_{node.outputs[0].name}"
    graph.outputs.extend(outputs)
    before = next(iter(given.values())).producer()
    assert before is not None
    graph.insert_after(before, nodes)


def graph_text(config: Gemma3Config) -> str:
    """Return :data:`GRAPH` with the sizes of one model."""
    size = screen_format(config).block_size
    numbers = {
        "BLOCK_SIZE": size,
        "BLOCKS": config.hidden_size // size,
        "COLUMNS": config.hidden_size,
        "ROWS": config.vocab_size,
        "LIMIT": max(MIN_LIMIT, config.vocab_size // LIMIT_SHARE),
        "LAST": np.iinfo(np.int64).max,
        "LEVELS": float(LEVELS),
        "DOUBT": SLACK * math.sqrt(config.hidden_size) / (2 * LEVELS),
    }
    text = GRAPH
    for name, number in numbers.items():
        text = text.replace(name, str(number))
    return text


def write_screen(
    graph: ir.Graph, config: Gemma3Config, path: Path, on_write: OnWrite | None = None
) -> str:
    """Write the weights that :class:`ScreenHead` added, and attach them to ``graph``.

    Args:
        graph: its head has values in an external data file.
        config: the model.
        path: the external data file to write, in the graph's folder.
        on_write: called with the number of bytes just written.

    Returns:
        The SHA-256 of the file.
    """
    block_format = screen_format(config)
    head = graph.initializers[config.head_name].const_value
    assert isinstance(head, ir.ExternalTensor)
    collected: dict[str, list[torch.Tensor]] = {SCALES: [], MARGINS: []}
    with path.open("wb") as file:
        writer = HashingWriter(file, on_write)
        offsets = {CODES: 0}
        for rows in read_head(head, config):
            matrix = quantize(rows, block_format)
            writer.write(raw_bytes(pack_codes(matrix)))
            collected[SCALES].append(matrix.scales)
            collected[MARGINS].append(row_margins(rows, matrix.dequantize()))
        for key, axis in ((SCALES, 0), (MARGINS, 1)):
            writer.align()
            offsets[key] = writer.position
            writer.write(raw_bytes(torch.cat(collected[key], dim=axis)))
    tensors = block_tensors(NAME, block_format, config.vocab_size, config.hidden_size)
    tensors[MARGINS] = StoredTensor(f"{NAME}.{MARGINS}", (2, config.vocab_size), "float32")
    for key, tensor in tensors.items():
        attach(graph.initializers[tensor.name], tensor, offsets[key], path)
    return writer.digest.hexdigest()


def read_head(stored: ir.ExternalTensor, config: Gemma3Config) -> Iterator[torch.Tensor]:
    """Yield the head as written, some rows at a time.

    Reading through a memory map would count the whole matrix as resident memory.
    """
    columns = config.hidden_size
    step = max(1, CHUNK_BYTES // (4 * columns))
    with Path(stored.path).open("rb") as file:
        file.seek(stored.offset or 0)
        for start in range(0, config.vocab_size, step):
            rows = min(step, config.vocab_size - start)
            yield torch.from_numpy(np.fromfile(file, "<f4", rows * columns).reshape(rows, columns))


def row_margins(weights: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    """Return [2, V]: the largest logit error of each row per unit of |h|, and its copy's norm."""
    errors, lengths = (copies - weights).norm(dim=1), copies.norm(dim=1)
    rounding = SUM_ERROR * weights.shape[1] * lengths
    return SLACK * torch.stack((errors + rounding, lengths))
