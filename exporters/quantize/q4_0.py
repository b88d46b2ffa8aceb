"""Round to 4 bits by Q4_0's own rule, for checkpoints that were trained to lose nothing by it.

Quantization-aware training (QAT) moves the weights onto, or near, the grid that llama.cpp's Q4_0
quantizer rounds to. Any other rule, however clever, moves them away again. The rule is that of
``quantize_row_q4_0_ref`` in ggml: the scale of a block is its value of largest magnitude, sign
included, divided by -8, so that this value has the code 0. Codes are computed with the float32
scale, and the scale is then stored as float16. The results equal those of the ``gguf`` package bit
for bit.

Shapes: N rows, K columns, G blocks of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gemma3_export.bundle import BlockFormat, WeightRecipe
from gemma3_export.config import EMBEDDING, HEAD
from gemma3_export.exporters.quantize.calibration import CalibrationData
from gemma3_export.exporters.quantize.gptq_quantizer import GptqQuantizer
from gemma3_export.exporters.quantize.mixed_precision import (
    HELD_OUT_SEQUENCES,
    DivergenceMeter,
    measure_quantized,
)
from gemma3_export.exporters.quantize.quantizers import CHUNK_BYTES, matrix_names, packed_format
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.reference.weights.block_matrix import BlockMatrix

__all__ = [
    "GRID",
    "GgufRounding",
    "compare_with_gptq",
    "reason_for_q4_0",
    "round_q4_0",
    "round_q8_0",
]

Reason = Literal["requested", "grid", "name"]

GRID = BlockFormat(bits=4, block_size=32)
WIDE = BlockFormat(bits=8, block_size=32)  # Q8_0
QAT_NAME = "qat-q4_0-unquantized"  # ends the names of Google's repositories
# A weight on the grid was rounded to the checkpoint's bfloat16, and so was the one that gives the
# scale: two relative errors of 2**-8 each. Without training, blocks meet this by chance in about
# one of 10**20 cases.
GRID_TOLERANCE = 2.0**-7
COMPARED_PARAMETERS = 2**31  # of models that are held in memory twice to measure the difference


def round_q4_0(weights: Tensor) -> BlockMatrix:
    """Round finite weights [N, K] as llama.cpp's Q4_0 quantizer does."""
    blocks = weights.float().view(len(weights), -1, GRID.block_size)
    # argmax returns the first of several maximums, as the loop of the original does.
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = largest / -8
    # Two roundings to float32, as in the original without fused multiply-adds.
    codes = (blocks * inverse(scales) + 8.5).trunc().clamp_(0, 15)
    return as_matrix(GRID, codes, scales)


def round_q8_0(weights: Tensor) -> BlockMatrix:
    """Round finite weights [N, K] as llama.cpp's Q8_0 quantizer does."""
    blocks = weights.float().view(len(weights), -1, WIDE.block_size)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * inverse(scales)
    magnitude = scaled.abs()
    whole = magnitude.floor()  # halves are rounded away from zero, as roundf does
    rounded = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())
    return as_matrix(WIDE, rounded + 128, scales)


def inverse(scales: Tensor) -> Tensor:
    """Return 1 / scales; 0 where that is not finite."""
    inverted = 1.0 / scales
    return torch.where(inverted.isfinite(), inverted, 0.0)


def as_matrix(block_format: BlockFormat, codes: Tensor, scales: Tensor) -> BlockMatrix:
    """Combine codes [N, G, 32] with scales [N, G, 1], which GGUF stores as float16."""
    halves = scales.squeeze(-1).half().float()
    return BlockMatrix(block_format, codes.flatten(1).to(torch.uint8), halves)


def is_on_grid(source: WeightSource, name: str) -> bool:
    """Return True if Q4_0's rule changes no weight of a matrix by more than its storage did.

    Raises:
        InputError: a weight is not finite.
    """
    if dict(source.config.weight_shapes())[name][1] % GRID.block_size:
        return False
    for weights in source.chunks(name, max_bytes=CHUNK_BYTES):
        check_finite(name, weights)
        exact = weights.float()
        moved = (round_q4_0(exact).dequantize() - exact).abs_()
        if not bool((moved <= GRID_TOLERANCE * exact.abs()).all()):
            return False
    return True


def reason_for_q4_0(source: WeightSource, rounding: str) -> Reason | None:
    """Return why the layers are to be rounded by Q4_0's rule, None if GPTQ is to round them.

    Args:
        source: canonical weights.
        rounding: one of ``ROUNDINGS``.

    Raises:
        InputError: a weight is not finite.
    """
    if rounding != "auto":
        return "requested" if rounding == "q4_0" else None
    layers = (name for name in matrix_names(source.config) if name not in (EMBEDDING, HEAD))
    if all(is_on_grid(source, name) for name in layers):  # stops at the first that does not
        return "grid"
    return "name" if QAT_NAME in str(source.fingerprint().get("location", "")).lower() else None


@dataclass(frozen=True, kw_only=True)
class GgufRounding:
    """A ``Quantizer`` that rounds as GGUF's quantizers do: layers to Q4_0.

    Embedding and head become Q4_0 if they lie on its grid, and otherwise Q8_0, because training
    has not prepared them for 4 bits.

    Args:
        source: canonical weights.
        formats: format of each canonical matrix, from :meth:`of`.
        calibration: description for the manifest.
    """

    source: WeightSource
    formats: Mapping[str, BlockFormat]
    calibration: dict[str, Any]

    @classmethod
    def of(cls, source: WeightSource, reason: Reason) -> GgufRounding:
        """Choose the formats for ``source``.

        Raises:
            InputError: a weight is not finite, or a matrix is not a multiple of 32 columns.
        """
        shapes = dict(source.config.weight_shapes())
        formats = {}
        for name in matrix_names(source.config):
            is_table = name in (EMBEDDING, HEAD)
            formats[name] = WIDE if is_table and not is_on_grid(source, name) else GRID
            formats[name].check_columns(name, shapes[name][1])
        return cls(
            source=source, formats=formats, calibration={"rounding": "q4_0", "reason": reason}
        )

    def format(self, names: Sequence[str]) -> BlockFormat | None:
        """See :class:`gemma3_export.exporters.quantize.quantizers.Quantizer`."""
        return packed_format([self.formats.get(name) for name in names])

    def matrices(self, recipe: WeightRecipe) -> Iterator[BlockMatrix]:
        """See :class:`gemma3_export.exporters.quantize.quantizers.Quantizer`."""
        assert recipe.blocks is not None
        for name in recipe.names:
            for matrix in self._rounded(name):
                yield matrix.convert(recipe.blocks)

    def load(self, name: str) -> BlockMatrix:
        """Return a whole matrix."""
        return BlockMatrix.stack(list(self._rounded(name)))

    def _rounded(self, name: str) -> Iterator[BlockMatrix]:
        rule = round_q4_0 if self.formats[name] == GRID else round_q8_0
        for weights in self.source.chunks(name, max_bytes=CHUNK_BYTES):
            check_finite(name, weights)
            yield rule(weights)


def compare_with_gptq(
    rounding: GgufRounding, text: CalibrationData, folder: Path, progress: Progress
) -> GgufRounding:
    """Measure the divergence of both ways, and return ``rounding`` with the results.

    This takes as long as an export with GPTQ, and holds the model in memory twice.

    Args:
        rounding: Q4_0's way.
        text: its last sequences measure divergence, the others calibrate GPTQ.
        folder: an empty folder for the matrices of GPTQ.
        progress: receives the stage and its steps.

    Raises:
        InputError: a weight is not finite.
    """
    source = rounding.source
    calibration = CalibrationData(ids=text.ids[:-HELD_OUT_SEQUENCES], description=text.description)
    gptq = GptqQuantizer(source, calibration, folder, progress)
    matrices = gptq.quantize(dict.fromkeys(matrix_names(source.config), GRID))
    meter = DivergenceMeter(load_reference(source), text.ids[-HELD_OUT_SEQUENCES:])
    divergence = {
        "q4_0": measure_quantized(rounding, meter),
        "gptq": measure_quantized(matrices, meter),
    }
    about = rounding.calibration | {"divergence": divergence, "measured_on": text.description}
    return GgufRounding(source=source, formats=rounding.formats, calibration=about)
