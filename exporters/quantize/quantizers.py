"""The quantizers that need no calibration text, and the interface of all quantizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from gemma3_export.bundle import BlockFormat, WeightRecipe, common_format
from gemma3_export.config import EMBEDDING, Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.exporters.quantize.gguf_blocks import gguf_format, read_gguf_blocks
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.reference.weights.block_matrix import BlockMatrix, quantize

__all__ = ["GgufRepacker", "Quantizer", "RoundToNearest", "matrix_names", "packed_format"]

CHUNK_BYTES = 64 * 2**20


class Quantizer(Protocol):
    """A source of quantized matrices, some rows at a time."""

    @property
    def calibration(self) -> dict[str, Any] | None:
        """Description of the calibration text for the manifest, None without calibration."""

    def format(self, names: Sequence[str]) -> BlockFormat | None:
        """Return the format of the matrices ``names`` packed into one, None for float32."""

    def matrices(self, recipe: WeightRecipe) -> Iterator[BlockMatrix]:
        """Yield the rows of a packed matrix in the format ``recipe.blocks``, in order.

        Raises:
            InputError: a weight is not finite.
        """


def matrix_names(config: Gemma3Config) -> list[str]:
    """Return the canonical names of all matrices: every weight except the norms."""
    return [name for name, shape in config.weight_shapes() if len(shape) == 2]


def row_ranges(source: WeightSource, name: str) -> Iterator[tuple[int, int]]:
    """Yield row ranges of a canonical matrix, of about :data:`CHUNK_BYTES` in float32."""
    rows, columns = dict(source.config.weight_shapes())[name]
    step = max(1, CHUNK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """A :class:`Quantizer` that rounds each block on its own; see ``block_matrix.quantize``.

    Args:
        source: canonical weights.
        formats: format of each canonical matrix; others stay float32.
        smoothing: the factors [K] of those with smoothed formats.

    Raises:
        InputError: a matrix is not a multiple of its block size.
    """

    source: WeightSource
    formats: Mapping[str, BlockFormat]
    smoothing: Mapping[str, Tensor] = field(default_factory=dict)
    calibration: None = None

    def __post_init__(self) -> None:
        shapes = dict(self.source.config.weight_shapes())
        for name, block_format in self.formats.items():
            block_format.check_columns(name, shapes[name][1])

    def format(self, names: Sequence[str]) -> BlockFormat | None:
        """See :class:`Quantizer`."""
        return packed_format([self.formats.get(name) for name in names])

    def matrices(self, recipe: WeightRecipe) -> Iterator[BlockMatrix]:
        """See :class:`Quantizer`."""
        assert recipe.blocks is not None
        for name in recipe.names:
            for weights in self.source.chunks(name, max_bytes=CHUNK_BYTES):
                check_finite(name, weights)
                yield quantize(weights, recipe.blocks, smoothing=self.smoothing.get(name))


@dataclass(frozen=True, kw_only=True)
class GgufRepacker:
    """A :class:`Quantizer` that keeps the weights of a quantized GGUF file exactly.

    Matrices of a float type in the file stay float32.

    Raises:
        InputError: the weights are not a quantized GGUF file, or have an unsupported type.
    """

    source: WeightSource
    calibration: None = None

    def __post_init__(self) -> None:
        formats = [self._format(name) for name in matrix_names(self.source.config)]
        if not any(formats):
            raise InputError(
                f"{self.source.origin} has no quantized matrix to keep; pass a quantized GGUF "
                "file, or choose another --dtype"
            )

    def _format(self, name: str) -> BlockFormat | None:
        tensor = self.source.gguf_tensor(name)
        if tensor is None:
            return None
        found = gguf_format(tensor)
        if name == EMBEDDING and found is not None and found.has_minimum:
            return BlockFormat(bits=8, block_size=found.block_size, has_minimum=True)
        return found

    def format(self, names: Sequence[str]) -> BlockFormat | None:
        """See :class:`Quantizer`."""
        return packed_format([self._format(name) for name in names])

    def matrices(self, recipe: WeightRecipe) -> Iterator[BlockMatrix]:
        """See :class:`Quantizer`."""
        assert recipe.blocks is not None
        for name in recipe.names:
            tensor = self.source.gguf_tensor(name)
            assert tensor is not None
            for start, stop in row_ranges(self.source, name):
                matrix = read_gguf_blocks(tensor, start, stop)
                check_finite(name, matrix.scales)
                if matrix.minimums is not None:
                    check_finite(name, matrix.minimums)
                yield matrix.convert(recipe.blocks)


def packed_format(formats: Sequence[BlockFormat | None]) -> BlockFormat | None:
    """Return the format of matrices packed into one product, None if any stays float32."""
    quantized = [item for item in formats if item is not None]
    return common_format(quantized) if len(quantized) == len(formats) else None
