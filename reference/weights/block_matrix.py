"""Quantized matrices in memory: conversion between float32 and codes with scales.

Shapes: N rows (outputs), K columns (inputs), G blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma3_export.bundle import BlockFormat
from gemma3_export.dtypes import torch_dtype

__all__ = [
    "BlockMatrix",
    "block_scales",
    "hadamard",
    "pack_codes",
    "quantize",
    "rotate",
    "signed_codes",
    "unpack_codes",
    "unsigned_codes",
]

SHRINKS = 1.0 - 0.0125 * torch.arange(
    24
)  # candidate scales, relative to the scale that clips nothing


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """Rows of a matrix in one :class:`gemma3_export.bundle.block_format.BlockFormat`."""

    format: BlockFormat
    codes: Tensor  # [N, K] uint8, one code per element, also for 4 bits
    scales: Tensor  # [N, G] float32, whatever the stored type
    minimums: Tensor | None = None  # [N, G] float32
    smoothing: Tensor | None = None  # [K] float32

    def dequantize(self) -> Tensor:
        """Return the weights, [N, K] float32."""
        blocks = in_blocks(self.codes, self.format)
        weights = self.scales[..., None] * (blocks.to(torch.float32) - self.format.zero_point)
        if self.minimums is not None:
            weights -= self.minimums[..., None]
        weights = rotate(weights.flatten(1), self.format.rotation)
        return weights if self.smoothing is None else weights / self.smoothing

    def convert(self, wanted: BlockFormat) -> BlockMatrix:
        """Return the same weights in a format at least as wide; see ``common_format``."""
        if wanted == self.format:
            return self
        repeats = self.format.block_size // wanted.block_size
        minimums = self.minimums
        if wanted.has_minimum and minimums is None:
            minimums = torch.zeros_like(self.scales)
        shift = wanted.zero_point - self.format.zero_point
        return BlockMatrix(
            wanted,
            (self.codes.to(torch.int16) + shift).to(torch.uint8),
            stored_scales(self.scales.repeat_interleave(repeats, 1), wanted),
            None if minimums is None else minimums.repeat_interleave(repeats, 1),
        )

    @classmethod
    def stack(cls, parts: Sequence[BlockMatrix]) -> BlockMatrix:
        """Concatenate the rows of matrices of one format."""
        first = parts[0]
        minimums = [part.minimums for part in parts if part.minimums is not None]
        return cls(
            first.format,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(minimums) if minimums else None,
            first.smoothing,
        )


def rotate(x: Tensor, size: int) -> Tensor:
    """Multiply each ``size`` consecutive columns of x [..., K] by a normalized Hadamard matrix.

    The matrix is symmetric and orthogonal: a second call undoes the first, and the product of two
    rotated matrices is that of the originals. Single large inputs are spread over all columns, so
    that a row needs only one scale.
    """
    if size == 1:
        return x
    return (x.reshape(*x.shape[:-1], -1, size) @ hadamard(size).to(x)).reshape(x.shape)


def hadamard(size: int) -> Tensor:
    """Return the normalized Hadamard matrix [size, size] float64; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat(
            (torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1))
        )
    return matrix / math.sqrt(size)


def in_blocks(matrix: Tensor, block_format: BlockFormat) -> Tensor:
    """View [N, K] as [N, G, block]."""
    return matrix.view(matrix.shape[0], -1, block_format.block_size)


def quantize(
    weights: Tensor,
    block_format: BlockFormat,
    importance: Tensor | None = None,
    smoothing: Tensor | None = None,
) -> BlockMatrix:
    """Round ``weights`` to the nearest codes.

    Scales of 8-bit blocks clip nothing. Scales of 4-bit blocks are searched for the least squared
    error, weighted by ``importance``, and the largest weight uses the extra code on the negative
    side (both as llama.cpp's ``Q4_0`` quantizer does).

    Args:
        weights: finite numbers, [N, K].
        block_format: a format without minimums.
        importance: weight of the error in each input, [K]; None weights all equally.
        smoothing: of a smoothed format, the factor of each input, [K] float32.
    """
    weights = weights.float() if smoothing is None else weights.float() * smoothing
    weights = rotate(weights, block_format.rotation)
    scales = block_scales(weights, block_format, importance)
    codes = codes_of(in_blocks(weights, block_format), scales, block_format)
    return BlockMatrix(block_format, codes.flatten(1), scales, smoothing=smoothing)


def block_scales(
    weights: Tensor, block_format: BlockFormat, importance: Tensor | None = None
) -> Tensor:
    """Return the scales of ``weights`` as they are rounded, [N, G]; see :func:`quantize`."""
    blocks = in_blocks(weights.float(), block_format)
    if block_format.bits == 8:
        return stored_scales(blocks.abs().amax(-1) / 127, block_format)
    return stored_scales(searched_scales(blocks, block_format, importance), block_format)


def stored_scales(scales: Tensor, block_format: BlockFormat) -> Tensor:
    """Round float32 scales to their stored type, so that codes match what is stored."""
    return scales.to(torch_dtype(block_format.scale_type)).float()


def codes_of(blocks: Tensor, scales: Tensor, block_format: BlockFormat) -> Tensor:
    """Return the nearest code of each weight, [..., G, block] uint8."""
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]
    codes = torch.round(blocks * inverse) + block_format.zero_point
    return codes.clamp_(0, 2**block_format.bits - 1).to(torch.uint8)


def searched_scales(blocks: Tensor, block_format: BlockFormat, importance: Tensor | None) -> Tensor:
    """Return the scale with the least weighted squared error per block, [N, G]."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    full = largest / -block_format.zero_point
    weight = 1.0 if importance is None else importance.view(1, -1, block_format.block_size)
    best = full.clone()
    least = torch.full_like(full, torch.inf)
    for shrink in SHRINKS.tolist():
        scales = full * shrink
        codes = codes_of(blocks, scales, block_format)
        found = scales[..., None] * (codes.to(torch.float32) - block_format.zero_point)
        error = ((found - blocks).square_() * weight).sum(-1)
        better = error < least
        best = torch.where(better, scales, best)
        least = torch.where(better, error, least)
    return best


def pack_codes(matrix: BlockMatrix) -> Tensor:
    """Pack codes into [N, G, bytes per block] uint8; the first of two 4-bit codes is low."""
    blocks = in_blocks(matrix.codes, matrix.format)
    if matrix.format.bits == 4:
        blocks = blocks[..., 0::2] | blocks[..., 1::2] << 4
    return blocks.contiguous()


def signed_codes(matrix: BlockMatrix) -> Tensor:
    """Return 8-bit codes around zero, [N, K] int8."""
    return (matrix.codes.to(torch.int16) - matrix.format.zero_point).to(torch.int8)


def unsigned_codes(codes: Tensor, block_format: BlockFormat) -> Tensor:
    """Return what :func:`signed_codes` was made from, uint8."""
    return (codes.to(torch.int16) + block_format.zero_point).to(torch.uint8)


def unpack_codes(packed: Tensor, block_format: BlockFormat) -> Tensor:
    """Unpack [N, G, bytes per block] into codes, [N, K] uint8."""
    if block_format.bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return packed.flatten(1)
