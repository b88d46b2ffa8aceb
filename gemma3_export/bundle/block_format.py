"""How quantised matrices are stored: small integers in blocks of columns that share a scale.

A weight is ``scale * (code - zero_point) - minimum``. The layout is that of ONNX Runtime's
``MatMulNBits`` and ``GatherBlockQuantized``.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma3_export.dtypes import ELEMENT_TYPES, DType
from gemma3_export.errors import InputError

__all__ = [
    "CODES",
    "LOOKUP_SCALES",
    "MINIMUMS",
    "SCALES",
    "ZERO_POINTS",
    "BlockFormat",
    "StoredTensor",
    "block_tensors",
    "common_format",
]

CODES, SCALES, MINIMUMS, ZERO_POINTS = "codes", "scales", "minimums", "zero_points"
LOOKUP_SCALES = "lookup_scales"  # the scales again, in the shape that the embedding's lookup takes
BITS = (4, 8)
MINIMUM_BYTES = 4  # always float32


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFormat:
    """Storage of one quantised matrix [N, K] (N outputs, K inputs).

    Args:
        bits: 4 or 8 for a weight.
        block_size: consecutive inputs that share a scale: a power of two, at least 16.
        has_minimum: each block also has a float that is subtracted (the K types of GGUF).
        scale_type: of the scales, which the kernels want in the type of the activations.

    Raises:
        InputError: another number of bits or block size.
    """

    bits: int
    block_size: int
    has_minimum: bool = False
    scale_type: DType = "float32"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"weights of {self.bits} bits do not exist here; choose 4 or 8")
        size = self.block_size
        if not 16 <= size <= 256 or size & (size - 1):
            raise InputError(f"the block size is {size}; choose 16, 32, 64, 128 or 256")

    def __str__(self) -> str:
        scales = "" if self.scale_type == "float32" else f" {self.scale_type}"
        return f"int{self.bits} b{self.block_size}{' min' if self.has_minimum else ''}{scales}"

    @property
    def zero_point(self) -> int:
        """The code of zero, before the minimum. With a minimum, 4-bit codes are unsigned."""
        return 0 if self.has_minimum and self.bits == 4 else 1 << (self.bits - 1)

    def check_columns(self, name: str, columns: int) -> None:
        """Refuse a matrix that blocks do not divide.

        Raises:
            InputError: naming the matrix.
        """
        if columns % self.block_size:
            raise InputError(
                f"{name} has {columns} columns, which blocks of {self.block_size} do not divide; "
                "choose a smaller block size, or keep the matrix in float32"
            )

    def size_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a stored matrix, all its parts."""
        blocks = columns // self.block_size
        size = (
            rows * columns * self.bits // 8
            + rows * blocks * ELEMENT_TYPES[self.scale_type].size_bytes
        )
        if self.has_minimum:
            size += rows * blocks * MINIMUM_BYTES
            if self.bits == 4:
                size += rows * ((blocks + 1) // 2)  # explicit zero points
        return size


def common_format(formats: list[BlockFormat]) -> BlockFormat:
    """The narrowest format that holds matrices of all ``formats`` without loss.

    Matrices that are packed into one product share a format: wider codes hold narrower ones, and
    small blocks repeat the scale of a large one.
    """
    return BlockFormat(
        bits=max(item.bits for item in formats),
        block_size=min(item.block_size for item in formats),
        has_minimum=any(item.has_minimum for item in formats),
    )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor among those that a quantised matrix is stored as."""

    name: str
    shape: tuple[int, ...]
    dtype: DType


def block_tensors(
    name: str, block_format: BlockFormat, rows: int, columns: int
) -> dict[str, StoredTensor]:
    """Return what the matrix ``name`` [rows, columns] is stored as, in the order of the file.

    ``lookup_scales`` is an alias of ``scales``, without bytes of its own.
    """
    blocks = columns // block_format.block_size
    codes = (rows, blocks, block_format.block_size * block_format.bits // 8)
    shapes: dict[str, tuple[tuple[int, ...], DType]] = {
        CODES: (codes, "uint8"),
        SCALES: ((rows, blocks), block_format.scale_type),
    }
    if block_format.has_minimum:
        shapes[MINIMUMS] = ((rows, blocks), "float32")
        if block_format.bits == 4:
            shapes[ZERO_POINTS] = ((rows, (blocks + 1) // 2), "uint8")
    return {
        part: StoredTensor(f"{name}.{part}", shape, dtype)
        for part, (shape, dtype) in shapes.items()
    }
