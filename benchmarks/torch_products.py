"""Time torch's CPU kernels for products with quantized matrices against float32.

    python -m benchmarks.torch_products
    python -m benchmarks.torch_products --rows 1 --rows 8 --layers 4 --only int8

The matrices have the shapes of the 270M, one of each kind per layer, so that no cache keeps them
between two uses. Times are the minimum of several runs on one thread, in processor time, so other
load on the machine hardly counts. "as stored" tells whether the kernel reads the codes in the
layout of the file, which the embedding lookup can then share.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import torch
import torch.nn.functional as F  # noqa: N812  (torch's convention)
from torch import Tensor

from gemma3_export.exporters.torch.matrix import BlockedMatrix

Product = Callable[[Tensor], Tensor]
SHAPES = {  # [outputs, inputs]
    "qkv": (1536, 640),
    "o": (640, 1024),
    "gate_up": (4096, 640),
    "down": (640, 2048),
    "head": (262144, 640),
}
BLOCK_SIZE = 128
HEAD_ROWS = 8  # the head computes logits for few tokens
GROUP = 32  # inputs per scale, for kernels with groups


@dataclass(frozen=True, slots=True)
class Matrix:
    """Random codes with one scale per row."""

    codes: Tensor  # [N, K] int8
    scales: Tensor  # [N] float32

    @classmethod
    def random(cls, rows: int, columns: int) -> Matrix:
        """Draw codes that look like rounded weights."""
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return cls(codes, torch.rand(rows) * 1e-3)

    @property
    def weights(self) -> Tensor:
        """Return the weights [N, K] in float32."""
        return self.codes * self.scales[:, None]


def plain(matrix: Matrix, dtype: torch.dtype) -> Product:
    """Use torch's floating-point product."""
    weights = matrix.weights.to(dtype)
    return lambda x: F.linear(x.to(dtype), weights)


def prepacked(matrix: Matrix) -> Product:
    """Use float32 in oneDNN's layout, as an fp32 archive does."""
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.weights, 512)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def int8_rows(matrix: Matrix, dtype: torch.dtype) -> Product:
    """Use 8-bit codes with one scale per row, and floating-point products."""
    scales = matrix.scales.to(dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.to(dtype), matrix.codes, scales)


def blocked(matrix: Matrix) -> Product:
    """Use :class:`BlockedMatrix` with blocks of 128, as an int8 archive does."""
    rows, columns = matrix.codes.shape
    blocks = columns // BLOCK_SIZE
    codes = matrix.codes.view(rows, blocks, BLOCK_SIZE).transpose(0, 1).contiguous()
    product = torch.jit.script(BlockedMatrix(codes, matrix.scales.repeat(blocks, 1)))
    return lambda x: product(x.bfloat16())


def int4_groups(matrix: Matrix, dtype: torch.dtype) -> Product:
    """Use 4-bit codes with a scale and a zero point per group, and floating-point products."""
    rows, columns = matrix.codes.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = (torch.rand(columns // GROUP, rows, 2) * 1e-3).to(dtype)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(dtype), packed, GROUP, scales)


def int4_rounded(matrix: Matrix) -> Product:
    """Use 4-bit codes with one scale per group, and inputs rounded to int8 per row."""
    rows, columns = matrix.codes.shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.rand(rows, columns // GROUP) * 1e-3
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(codes, scales, None, GROUP, columns, rows)
    return lambda x: torch.ops.aten._dyn_quant_matmul_4bit(x, packed, GROUP, columns, rows)


def int8_tensor(matrix: Matrix) -> Product:
    """Use ``quantized::linear_dynamic``, which rounds inputs with one scale for all rows."""
    zeros = torch.zeros(len(matrix.scales), dtype=torch.int64)
    weights = torch._make_per_channel_quantized_tensor(
        matrix.codes, matrix.scales.double(), zeros, 0
    )
    packed = torch.ops.quantized.linear_prepack(weights, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def half_weights(matrix: Matrix) -> Product:
    """Use ``quantized::linear_dynamic_fp16``: 16-bit weights, floating-point products."""
    packed = torch.ops.quantized.linear_prepack_fp16(matrix.weights, None)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def onednn_tensor(matrix: Matrix) -> Product:
    """Use ``onednn::qlinear_pointwise``, which takes inputs with one scale for all rows."""
    packed = torch.ops.onednn.qlinear_prepack(matrix.codes, None)
    zeros = torch.zeros(len(matrix.scales), dtype=torch.int64)

    def product(x: Tensor) -> Tensor:
        scale = float(x.abs().amax()) / 127
        codes = torch.round(x / scale).to(torch.int8)
        result: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, scale, 0, packed, matrix.scales, zeros, *result
        )
        return found

    return product


def integer_product(matrix: Matrix) -> Product:
    """Use ``aten::_int_mm`` with inputs rounded to int8 per row."""

    def product(x: Tensor) -> Tensor:
        scales = x.abs().amax(1, keepdim=True) / 127
        codes = torch.round(x / scales).to(torch.int8)
        return torch._int_mm(codes, matrix.codes.t()) * scales * matrix.scales

    return product


def dequantized(matrix: Matrix, dtype: torch.dtype) -> Product:
    """Convert the codes to floating point on each use."""
    return lambda x: F.linear(x.to(dtype), matrix.codes.to(dtype)) * matrix.scales


CANDIDATES: dict[str, tuple[str, Callable[[Matrix], Product]]] = {
    "float32": ("yes", lambda matrix: plain(matrix, torch.float32)),
    "float32, oneDNN's layout": ("no", prepacked),
    "bfloat16": ("yes", lambda matrix: plain(matrix, torch.bfloat16)),
    "_weight_int8pack_mm, float32": ("yes", lambda matrix: int8_rows(matrix, torch.float32)),
    "_weight_int8pack_mm, bfloat16": ("yes", lambda matrix: int8_rows(matrix, torch.bfloat16)),
    "our int8, blocks of 128": ("yes", blocked),
    "_weight_int4pack_mm_for_cpu, float32": (
        "no",
        lambda matrix: int4_groups(matrix, torch.float32),
    ),
    "_weight_int4pack_mm_for_cpu, bfloat16": (
        "no",
        lambda matrix: int4_groups(matrix, torch.bfloat16),
    ),
    "_dyn_quant_matmul_4bit": ("no", int4_rounded),
    "quantized::linear_dynamic": ("no", int8_tensor),
    "quantized::linear_dynamic_fp16": ("no", half_weights),
    "onednn::qlinear_pointwise": ("no", onednn_tensor),
    "_int_mm": ("yes", integer_product),
    "codes to float32, product": ("yes", lambda matrix: dequantized(matrix, torch.float32)),
    "codes to bfloat16, product": ("yes", lambda matrix: dequantized(matrix, torch.bfloat16)),
}


@click.command()
@click.option("--rows", multiple=True, type=int, default=(1, 512), show_default=True)
@click.option("--layers", default=18, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Only candidates whose name contains TEXT."
)
def main(rows: tuple[int, ...], layers: int, repeats: int, only: tuple[str, ...]) -> None:
    """Print one table per number of rows: milliseconds for all layers, and for the head."""
    warnings.filterwarnings("ignore", message=".*quantized tensor creation")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = [
        name
        for name in CANDIDATES
        if name == "float32" or not only or any(text in name for text in only)
    ]
    found: dict[tuple[str, str], dict[int, float]] = {}
    for kind, shape in SHAPES.items():
        copies = 1 if kind == "head" else layers
        matrices = [Matrix.random(*shape) for _ in range(copies)]
        for name in names:
            found[name, kind] = measure(name, matrices, shape[1], rows, repeats)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, one thread: ms (x float32)\n")
    for count in rows:
        print_table(count, names, found)


@torch.inference_mode()
def measure(
    name: str, matrices: Sequence[Matrix], columns: int, rows: Sequence[int], repeats: int
) -> dict[int, float]:
    """Return the minimum milliseconds of one product per matrix, for each number of rows."""
    products = [CANDIDATES[name][1](matrix) for matrix in matrices]
    times: dict[int, float] = {}
    for count in rows:
        if len(products) == 1 and count > HEAD_ROWS:
            continue
        x = torch.randn(count, columns)
        taken = []
        for _ in range(repeats + 1):
            started = time.process_time()
            for product in products:
                product(x)
            taken.append(1e3 * (time.process_time() - started))
        times[count] = min(taken[1:])
    return times


def print_table(
    count: int, names: Sequence[str], found: dict[tuple[str, str], dict[int, float]]
) -> None:
    """Print a Markdown table with one line per candidate."""
    kinds = [*SHAPES][:-1]
    print(f"| {count} rows | as stored | {' | '.join(kinds)} | all layers | head |")
    print("|---" * (len(kinds) + 4) + "|")
    base = {kind: found["float32", kind].get(count, 0.0) for kind in SHAPES}
    for name in names:
        own = {kind: found[name, kind].get(count, 0.0) for kind in SHAPES}
        layers = sum(own[kind] for kind in kinds)
        cells = [f"{own[kind]:.2f}" for kind in kinds]
        cells.append(f"{layers:.2f} ({sum(base[kind] for kind in kinds) / layers:.2f})")
        head = own["head"]
        cells.append(f"{head:.2f} ({base['head'] / head:.2f})" if head else "")
        print(f"| {name} | {CANDIDATES[name][0]} | {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    main()
