"""Quantised matrices that were made with calibration text, kept on disk until they are written."""

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
from gemma3_export.exporters.quantize.calibration import Calibration
from gemma3_export.exporters.quantize.gptq import DAMPING, GptqRounding, Hessian
from gemma3_export.exporters.quantize.layerwise import LayerWalk
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

# A tied embedding is looked up as well as multiplied with. Of 0.01, 0.1 and 1, on the 270M, the
# divergence of both together is 0.140, 0.118 and 0.119.
TABLE_DAMPING = 0.1

Observer = Callable[[Sequence[str], Hessian], None]


@dataclass(frozen=True, kw_only=True)
class GptqMatrices:
    """A ``Quantizer`` of matrices that were quantised into a folder."""

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
        """Keep the rows of ``name``."""
        codes = torch.cat([pack_codes(part) for part in parts])
        scales = torch.cat([part.scales for part in parts])
        torch.save((codes, scales), self.folder / name)

    def load(self, name: str, rows: Tensor | None = None) -> BlockMatrix:
        """A matrix that was saved, or some of its rows."""
        codes, scales = torch.load(self.folder / name, mmap=True, weights_only=True)
        if rows is not None:
            codes, scales = codes[rows], scales[rows]
        block_format = self.formats[name]
        return BlockMatrix(block_format, unpack_codes(codes, block_format), scales)


class GptqQuantizer:
    """Quantises every matrix with the inputs that a text gives it.

    The embedding comes first, so that the layers make up for its rounding too; as the head it is
    rounded for the final states of the full-precision model.

    Args:
        source: canonical weights.
        text: what is sent through the model.
        folder: empty; it holds the matrices as long as they are needed.
        progress: told the layers done.
        observe: also shown what goes into matrices of the same inputs.

    Raises:
        InputError: a weight is not finite.
    """

    def __init__(
        self,
        source: WeightSource,
        text: Calibration,
        folder: Path,
        progress: Progress,
        observe: Observer | None = None,
    ) -> None:
        self.source, self.text, self.folder = source, text, folder
        self.progress = progress
        self.observe = observe
        self.tables: dict[str, BlockFormat] = {}  # embedding and head as they lie in the folder
        report = partial(progress, "reading the calibration text")
        self.final = LayerWalk(source, text.ids, report).run(self._original_rows, None)

    def quantize(self, formats: Mapping[str, BlockFormat]) -> GptqMatrices:
        """Quantise every matrix into the format that it has in ``formats``.

        What was made before is replaced.

        Raises:
            InputError: a weight is not finite, or blocks do not divide a matrix.
        """
        check_formats(self.source.config, formats)
        blocks = GptqMatrices(
            folder=self.folder, formats=formats, calibration=self.text.description
        )
        is_tied = self.source.config.tie_word_embeddings
        self._table(EMBEDDING, self.final if is_tied else None, blocks)
        if not is_tied:
            self._table(HEAD, self.final, blocks)

        def rounding(names: Sequence[str], hessian: Hessian) -> list[Tensor]:
            if self.observe is not None:
                self.observe(names, hessian)
            for name in names:
                blocks.save(name, round_rows(self.source, name, hessian, formats[name]))
            return [blocks.load(name).dequantize() for name in names]

        walk = LayerWalk(self.source, self.text.ids, partial(self.progress, "quantising"))
        walk.run(lambda tokens: blocks.load(EMBEDDING, tokens).dequantize(), rounding)
        return blocks

    def _table(self, name: str, hessian: Hessian | None, blocks: GptqMatrices) -> None:
        block_format = blocks.formats[name]
        if self.tables.get(name) == block_format:
            return
        if self.observe is not None and hessian is not None:
            self.observe([name], hessian)
        blocks.save(name, round_rows(self.source, name, hessian, block_format, TABLE_DAMPING))
        self.tables[name] = block_format

    def _original_rows(self, tokens: Tensor) -> Tensor:
        read = [self.source.read(EMBEDDING, token, token + 1) for token in tokens.tolist()]
        rows = torch.cat(read).float()
        check_finite(EMBEDDING, rows)
        return rows


def check_formats(config: Gemma3Config, formats: Mapping[str, BlockFormat]) -> None:
    """Refuse blocks that do not divide a matrix.

    Raises:
        InputError: naming the first.
    """
    shapes = dict(config.weight_shapes())
    for name in matrix_names(config):
        formats[name].check_columns(name, shapes[name][1])


def round_rows(
    source: WeightSource,
    name: str,
    hessian: Hessian | None,
    block_format: BlockFormat,
    damping: float = DAMPING,
) -> list[BlockMatrix]:
    """One matrix, a few rows at a time; without a Hessian to the nearest codes."""
    rounding = None if hessian is None else GptqRounding(hessian.mean(), block_format, damping)
    parts = []
    for weights in source.chunks(name, max_bytes=CHUNK_BYTES):
        check_finite(name, weights)
        parts.append(
            quantize(weights, block_format) if rounding is None else rounding.quantize(weights)
        )
    return parts
