"""GPTQ: round a matrix so that its products change least (Frantar et al., arXiv:2210.17323).

Columns are rounded one by one, and the columns that follow compensate for the error as far as their
inputs correlate with those of the rounded column, which the Hessian tells. Scales are searched
first, with errors weighted by the Hessian's diagonal. So columns can be rounded in the order of
their importance, although blocks consist of adjacent columns.

Shapes: N rows (outputs), K columns (inputs), G blocks of a row, P positions of text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma3_export.bundle import BlockFormat
from gemma3_export.reference.weights.block_matrix import BlockMatrix, block_scales

__all__ = ["DAMPING", "GptqRounding", "Hessian"]

DAMPING = 0.01  # added to the Hessian's diagonal, relative to its mean
SWEEP = 64  # columns per lazy batch: their errors update later columns in one product
ROWS = 4096  # rows per pass, few enough to stay in the processor's cache


class Hessian:
    """The second moment of a matrix's inputs over calibration text."""

    def __init__(self, columns: int) -> None:
        self.sum = torch.zeros(columns, columns)
        self.positions = 0

    def add(self, x: Tensor) -> None:
        """Add inputs [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.positions += len(rows)

    def mean(self) -> Tensor:
        """Return the mean over positions, [K, K] float64."""
        return self.sum.double() / max(1, self.positions)


class GptqRounding:
    """GPTQ for rows of matrices that share their inputs.

    Args:
        hessian: second moment of the inputs, [K, K].
        block_format: a format without minimums.
        damping: added to the diagonal, relative to its mean. More damping keeps the weights closer
            to the originals, less damping keeps their products closer.
    """

    def __init__(
        self, hessian: Tensor, block_format: BlockFormat, damping: float = DAMPING
    ) -> None:
        self.format = block_format
        diagonal = hessian.diagonal().clone()
        self.importance = diagonal.float()
        self.order = torch.argsort(diagonal, descending=True, stable=True)
        damped = hessian.double()[self.order][:, self.order]
        mean = float(diagonal.mean())
        # Without damping, inputs that are always zero make the matrix singular.
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self.spread = torch.linalg.cholesky(inverse, upper=True).float()  # [K, K]

    def quantize(self, weights: Tensor) -> BlockMatrix:
        """Return codes and scales of rows [N, K]."""
        return BlockMatrix.stack(
            [self._quantize_rows(rows) for rows in torch.split(weights.float(), ROWS)]
        )

    def _quantize_rows(self, weights: Tensor) -> BlockMatrix:
        scales = block_scales(weights, self.format, self.importance)
        block_of = self.order // self.format.block_size
        left = weights.T[self.order].contiguous()  # [K, N], in rounding order
        steps = scales.T[block_of].contiguous()
        codes = torch.empty_like(left)
        for start in range(0, len(left), SWEEP):
            stop = min(start + SWEEP, len(left))
            errors = self._sweep(left, steps, codes, start, stop)
            left[stop:].addmm_(self.spread[start:stop, stop:].T, errors, alpha=-1)
        ordered = torch.empty_like(codes)
        ordered[self.order] = codes
        found = (ordered.T + self.format.zero_point).to(torch.uint8).contiguous()
        return BlockMatrix(self.format, found, scales)

    def _sweep(self, left: Tensor, steps: Tensor, codes: Tensor, start: int, stop: int) -> Tensor:
        """Round columns [start, stop) into ``codes``; return their errors [stop - start, N]."""
        zero = self.format.zero_point
        errors = torch.empty_like(left[start:stop])
        inverse = torch.where(steps[start:stop] == 0, 0.0, 1.0 / steps[start:stop])
        for column in range(start, stop):
            nearest = (left[column] * inverse[column - start]).round_().clamp_(-zero, zero - 1)
            codes[column] = nearest
            error = (left[column] - nearest * steps[column]) / self.spread[column, column]
            errors[column - start] = error
            after = self.spread[column, column + 1 : stop]
            left[column + 1 : stop].addr_(after, error, alpha=-1)
        return errors
