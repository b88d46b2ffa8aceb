"""Quantize all matrices of a model with GPTQ, into files that are deleted after the export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma3_export.bundle import BlockFormat, WeightRecipe
from gemma3_export.config import EMBEDDING, HEAD, Gemma3Config
from gemma3_export.exporters.quantize.calibration import CalibrationData
from gemma3_export.exporters.quantize.gptq import DAMPING, GptqRounding, Hessian
from gemma3_export.exporters.quantize.layerwise import head_inputs, quantize_layers
from gemma3_export.exporters.quantize.quantizers import CHUNK_BYTES, matrix_names, packed_format
from gemma3_export.progress import Progress
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.reference.weights.block_matrix import (
    BlockMatrix,
    pack_codes,
    quantize,
    unpack_codes,
)

__all__ = ["GptqMatrices", "GptqQuantizer", "check_formats"]

# A tied embedding is looked up as well as multiplied. On the 270M, damping of 0.01, 0.1 and 1 gives
# divergences of 0.140, 0.118 and 0.119 for both uses together.
TABLE_DAMPING = 0.1

Observer = Callable[[Sequence[str], Hessian], None]


@dataclass(frozen=True, kw_only=True)
class GptqMatrices:
    """A ``Quantizer`` of matrices that GPTQ has already quantized, one file each in ``folder``."""

    folder: Path
    formats: Mapping[str, BlockFormat]
    calibration: dict[str, Any]

    def format(self, names: Sequence[str]) -> BlockFormat | None:
        """See :class:`gemma3_export.exporters.quantize.quantizers.Quantizer`."""
        return packed_format([self.formats.get(name) for name in names])

    def matrices(self, recipe: WeightRecipe) -> Iterator[BlockMatrix]:
        """See :class:`gemma3_export.exporters.quantize.quantizers.Quantizer`."""
        for name in recipe.names:
            yield self.load(name)

    def save(self, name: str, parts: Sequence[BlockMatrix]) -> None:
        """Write the rows of ``name``."""
        codes = torch.cat([pack_codes(part) for part in parts])
        scales = torch.cat([part.scales for part in parts])
        torch.save((codes, scales), self.folder / name)

    def load(self, name: str, rows: Tensor | None = None) -> BlockMatrix:
        """Read a matrix, or the given rows of it."""
        codes, scales = torch.load(self.folder / name, mmap=True, weights_only=True)
        if rows is not None:
            codes, scales = codes[rows], scales[rows]
        block_format = self.formats[name]
        return BlockMatrix(block_format, unpack_codes(codes, block_format), scales)


class GptqQuantizer:
    """Quantizes every matrix with the inputs that calibration text gives it.

    The embedding comes first, so that the layers compensate for its rounding too. As the head, it
    is rounded for the final hidden states of the full-precision model.

    Args:
        source: canonical weights.
        text: the calibration text.
        folder: an empty folder for the quantized matrices.
        progress: receives the number of layers done.
        observe: receives each matrix group and the Hessian of its inputs.

    Raises:
        InputError: a weight is not finite.
    """

    def __init__(
        self,
        source: WeightSource,
        text: CalibrationData,
        folder: Path,
        progress: Progress,
        observe: Observer | None = None,
    ) -> None:
        self.source, self.text, self.folder = source, text, folder
        self.progress = progress
        self.observe = observe
        self.saved_tables: dict[str, BlockFormat] = {}  # embedding and head, as saved in the folder
        on_layer = partial(progress, "reading the calibration text")
        self.head_inputs = head_inputs(source, text.ids, self._read_embedding, on_layer)

    def quantize(self, formats: Mapping[str, BlockFormat]) -> GptqMatrices:
        """Quantize every matrix to its format in ``formats``, replacing earlier results.

        Raises:
            InputError: a weight is not finite, or a matrix is not a multiple of its block size.
        """
        check_formats(self.source.config, formats)
        matrices = GptqMatrices(
            folder=self.folder, formats=formats, calibration=self.text.description
        )
        is_tied = self.source.config.tie_word_embeddings
        self._quantize_table(EMBEDDING, self.head_inputs if is_tied else None, matrices)
        if not is_tied:
            self._quantize_table(HEAD, self.head_inputs, matrices)

        def quantize_group(names: Sequence[str], hessian: Hessian) -> list[Tensor]:
            if self.observe is not None:
                self.observe(names, hessian)
            for name in names:
                matrices.save(name, quantize_rows(self.source, name, hessian, formats[name]))
            return [matrices.load(name).dequantize() for name in names]

        quantize_layers(
            self.source,
            self.text.ids,
            lambda ids: matrices.load(EMBEDDING, ids).dequantize(),
            quantize_group,
            partial(self.progress, "quantizing"),
        )
        return matrices

    def _quantize_table(self, name: str, hessian: Hessian | None, matrices: GptqMatrices) -> None:
        block_format = matrices.formats[name]
        if self.saved_tables.get(name) == block_format:
            return
        if self.observe is not None and hessian is not None:
            self.observe([name], hessian)
        rows = quantize_rows(self.source, name, hessian, block_format, TABLE_DAMPING)
        matrices.save(name, rows)
        self.saved_tables[name] = block_format

    def _read_embedding(self, ids: Tensor) -> Tensor:
        read = [self.source.read(EMBEDDING, row, row + 1) for row in ids.tolist()]
        rows = torch.cat(read).float()
        check_finite(EMBEDDING, rows)
        return rows


def check_formats(config: Gemma3Config, formats: Mapping[str, BlockFormat]) -> None:
    """Check that the columns of every matrix are a multiple of its block size.

    Raises:
        InputError: with the name of the first matrix that is not.
    """
    shapes = dict(config.weight_shapes())
    for name in matrix_names(config):
        formats[name].check_columns(name, shapes[name][1])


def quantize_rows(
    source: WeightSource,
    name: str,
    hessian: Hessian | None,
    block_format: BlockFormat,
    damping: float = DAMPING,
) -> list[BlockMatrix]:
    """Quantize one matrix, some rows at a time; round to nearest if there is no Hessian."""
    rounding = None if hessian is None else GptqRounding(hessian.mean(), block_format, damping)
    parts = []
    for weights in source.chunks(name, max_bytes=CHUNK_BYTES):
        check_finite(name, weights)
        parts.append(
            quantize(weights, block_format) if rounding is None else rounding.quantize(weights)
        )
    return parts
