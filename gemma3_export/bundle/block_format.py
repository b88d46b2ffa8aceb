"""The formats of quantized matrices: small integers in blocks of columns that share a scale.

A weight is ``scale * (code - zero_point) - minimum``. The layout is that of ONNX Runtime's
``MatMulNBits`` and ``GatherBlockQuantized``. Rotated matrices have one block per row, and may be
stored transposed and signed, as ``MatMulIntegerToFloat`` reads them: see :func:`block_tensors`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemma3_export.dtypes import ELEMENT_TYPES, DType
from gemma3_export.errors import InputError

__all__ = [
    "CODES",
    "LOOKUP_SCALES",
    "MAX_ROTATION",
    "MINIMUMS",
    "SCALES",
    "SMOOTHING",
    "ZERO_POINTS",
    "BlockFormat",
    "StoredTensor",
    "block_tensors",
    "common_format",
]

CODES, SCALES, MINIMUMS, ZERO_POINTS = "codes", "scales", "minimums", "zero_points"
SMOOTHING = "smoothing"  # by which inputs are divided, and the weights of each input multiplied
LOOKUP_SCALES = "lookup_scales"  # the scales in the shape that GatherBlockQuantized reads
BITS = (4, 8)
MAX_ROTATION = 64  # of smoothed rows of the 270M: KLD 0.0044; 128 gives 0.0041 at twice the cost
MINIMUM_BYTES = SMOOTHING_BYTES = 4  # always float32


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFormat:
    """Storage format of a quantized matrix [N, K] (N outputs, K inputs).

    Args:
        bits: 4 or 8 per weight.
        block_size: consecutive inputs that share a scale: a power of two from 16 to 256.
        has_minimum: each block also has a float to subtract (GGUF's K types).
        scale_type: element type of the scales; kernels require that of the activations.
        rotation: consecutive inputs that a Hadamard matrix mixes before rounding, a power of two;
            1 mixes none. A rotated matrix has one scale per row: ``block_size`` is K.
        is_smoothed: before the rotation, the weights of each input are multiplied by a factor that
            the graph divides that input by (arXiv:2211.10438). Rotated matrices only.

    Raises:
        InputError: another number of bits or block size.
    """

    bits: int
    block_size: int
    has_minimum: bool = False
    scale_type: DType = "float32"
    rotation: int = 1
    is_smoothed: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"{self.bits}-bit weights are not supported; choose 4 or 8")
        size = self.block_size
        if self.is_smoothed and not self.is_rotated:
            raise InputError("only rotated rows can be smoothed; export the bundle again")
        if self.is_rotated:
            if self.bits != 8 or self.has_minimum or size % self.rotation:
                raise InputError(
                    f"rows of {size} {self.bits}-bit weights cannot be rotated in blocks of "
                    f"{self.rotation}; export the bundle again"
                )
            return
        if not 16 <= size <= 256 or size & (size - 1):
            raise InputError(f"block size {size} is not supported; choose 16, 32, 64, 128 or 256")

    def __str__(self) -> str:
        if self.is_rotated:
            smoothed = "smoothed and " if self.is_smoothed else ""
            return f"int{self.bits} rows, {smoothed}rotated by {self.rotation}"
        scales = "" if self.scale_type == "float32" else f" {self.scale_type}"
        return f"int{self.bits} b{self.block_size}{' min' if self.has_minimum else ''}{scales}"

    @classmethod
    def rotated_rows(cls, columns: int, largest: int = MAX_ROTATION) -> BlockFormat:
        """Return the 8-bit format with one scale per row of ``columns`` inputs, rotated.

        Without the rotation, single large inputs would take most of the range of a row.
        ``largest`` is the most inputs to mix.
        """
        return cls(bits=8, block_size=columns, rotation=math.gcd(columns, largest))

    @property
    def is_rotated(self) -> bool:
        """True if inputs are mixed before rounding."""
        return self.rotation > 1

    @property
    def zero_point(self) -> int:
        """The code that means zero before the minimum; 4-bit codes with a minimum are unsigned."""
        return 0 if self.has_minimum and self.bits == 4 else 1 << (self.bits - 1)

    def check_columns(self, name: str, columns: int) -> None:
        """Reject a matrix whose columns are not a multiple of the block size.

        Raises:
            InputError: with the name of the matrix.
        """
        if columns % self.block_size:
            raise InputError(
                f"{name} has {columns} columns, not a multiple of the block size "
                f"{self.block_size}; choose a smaller --block-size, or a --dtype without blocks"
            )

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the size of a stored matrix with scales, minimums and zero points."""
        blocks = columns // self.block_size
        size = (
            rows * columns * self.bits // 8
            + rows * blocks * ELEMENT_TYPES[self.scale_type].size_bytes
        )
        if self.has_minimum:
            size += rows * blocks * MINIMUM_BYTES
            if self.bits == 4:
                size += rows * ((blocks + 1) // 2)  # explicit zero points
        if self.is_smoothed:
            size += columns * SMOOTHING_BYTES
        return size


def common_format(formats: list[BlockFormat]) -> BlockFormat:
    """Return the narrowest format that represents matrices of all ``formats`` without loss.

    Matrices that are packed into one product share a format: wider codes represent narrower ones,
    and small blocks repeat the scale of a large one.
    """
    if len(set(formats)) == 1:
        return formats[0]
    return BlockFormat(
        bits=max(item.bits for item in formats),
        block_size=min(item.block_size for item in formats),
        has_minimum=any(item.has_minimum for item in formats),
    )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Name, shape and element type of one tensor in a graph's weight file."""

    name: str
    shape: tuple[int, ...]
    dtype: DType


def block_tensors(
    name: str, block_format: BlockFormat, rows: int, columns: int, *, transposed: bool = False
) -> dict[str, StoredTensor]:
    """Return the tensors that store the quantized matrix ``name``, in the order of the file.

    ``lookup_scales`` is not among them: it shares the bytes of ``scales``. Only rotated matrices
    can be ``transposed``. Their layout is that of ``MatMulIntegerToFloat``: inputs first, signed,
    one scale per output.

    Raises:
        InputError: ``transposed`` is for a matrix that is not rotated.
    """
    blocks = columns // block_format.block_size
    codes: tuple[int, ...] = (rows, blocks, block_format.block_size * block_format.bits // 8)
    if block_format.is_rotated:
        codes = (rows, columns)  # a matrix for MatMulInteger
    shapes: dict[str, tuple[tuple[int, ...], DType]] = {
        CODES: (codes, "uint8"),
        SCALES: ((rows, blocks), block_format.scale_type),
    }
    if transposed:
        if not block_format.is_rotated:
            raise InputError(f"{name} is transposed, but its format is {block_format}")
        shapes = {CODES: ((columns, rows), "int8"), SCALES: ((rows,), block_format.scale_type)}
    if block_format.is_smoothed:
        shapes[SMOOTHING] = ((columns,), "float32")
    if block_format.has_minimum:
        shapes[MINIMUMS] = ((rows, blocks), "float32")
        if block_format.bits == 4:
            shapes[ZERO_POINTS] = ((rows, (blocks + 1) // 2), "uint8")
    return {
        key: StoredTensor(f"{name}.{key}", shape, dtype) for key, (shape, dtype) in shapes.items()
    }
