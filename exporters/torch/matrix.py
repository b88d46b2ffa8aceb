"""Matrices that prepack themselves for the CPU when an archive is loaded.

Archives store plain matrices. On loading, in Python and C++ alike, ``__setstate__`` reorders a
float32 matrix on a CPU for oneDNN, whose one-row product then reads memory two to three times as
fast as torch's own. Other devices and half precision use the plain matrix.

Quantized matrices are read as stored, so the embedding lookup and the head share one copy.

TorchScript compiles these classes, so they may only use its subset of Python. It resolves
annotations itself, so this module must not defer them.
"""

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

__all__ = ["BlockedMatrix", "Matrix", "PlainMatrix"]

FEW_ROWS = 16  # with more rows, dequantizing is faster than the kernel for few rows
DEQUANTIZED_OUTPUTS = 16_384  # outputs to dequantize at once


class Matrix(nn.Module):
    """Product with, and rows of, a float matrix that prepacks itself when loaded on a CPU."""

    weight: Tensor
    packed: Tensor
    is_packed: bool
    keeps_rows: bool

    def __init__(self, weight: Tensor, keeps_rows: bool) -> None:
        super().__init__()
        self.weight = weight  # [out, in]
        self.packed = torch.empty(0)
        self.is_packed = False
        self.keeps_rows = keeps_rows  # an embedding also needs its rows unpacked

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in] to [..., out]."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, self.weight)

    @torch.jit.export
    def rows(self, ids: Tensor) -> Tensor:
        """Look up [B, T] row numbers as [B, T, in]."""
        return F.embedding(ids, self.weight)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool, bool]:
        """Return the state that the archive stores."""
        return self.weight, self.keeps_rows, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool, bool]) -> None:
        """Restore and prepack the matrix; the weight is already on its device."""
        self.weight = state[0]
        self.keeps_rows = state[1]
        self.training = state[2]
        self.packed = torch.empty(0)
        self.is_packed = False
        if self.weight.is_cpu and self.weight.dtype == torch.float32:
            # The layout for 512 rows is as fast as any for one row, and faster for 2 to 8.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 512)
            self.is_packed = True
            if not self.keeps_rows:
                self.weight = torch.empty(0)


class PlainMatrix(nn.Module):
    """A :class:`Matrix` without prepacking, for torch builds without oneDNN."""

    weight: Tensor

    def __init__(self, weight: Tensor, keeps_rows: bool) -> None:
        super().__init__()
        del keeps_rows
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in] to [..., out]."""
        return F.linear(x, self.weight)

    @torch.jit.export
    def rows(self, ids: Tensor) -> Tensor:
        """Look up [B, T] row numbers as [B, T, in]."""
        return F.embedding(ids, self.weight)


class BlockedMatrix(nn.Module):
    """A matrix of 8-bit blocks with bfloat16 inputs and outputs, and sums in float32.

    For few rows, torch's kernel for 8-bit weights multiplies one block of columns at a time: it
    supports only one scale per output. For many rows, the codes are dequantized first.

    Shapes: M rows, N outputs, K inputs, G blocks.
    """

    codes: Tensor
    scales: Tensor
    few_rows: int
    dequantized_outputs: int

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)  # [G, N, block] int8, around zero
        self.register_buffer("scales", scales)  # [G, N] float32
        self.few_rows = FEW_ROWS
        self.dequantized_outputs = DEQUANTIZED_OUTPUTS

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., K] to [..., N] in the type of ``x``."""
        return self.forward_float32(x).to(x.dtype)

    @torch.jit.export
    def forward_float32(self, x: Tensor) -> Tensor:
        """Multiply [..., K] to [..., N] float32, the type of the sums, for logits."""
        x_MK = x.reshape(-1, x.size(-1))
        if x.is_cpu and x_MK.size(0) <= self.few_rows:
            y = self.multiply_few_rows(x_MK)
        else:
            y = self.multiply_many_rows(x_MK)
        shape = list(x.shape)
        shape[-1] = y.size(-1)
        return y.view(shape)

    def multiply_few_rows(self, x_MK: Tensor) -> Tensor:
        """Multiply [M, K] to [M, N] float32 with the 8-bit kernel."""
        # The kernel's scales are bfloat16, so float32 scales are applied outside of it.
        ones = x_MK.new_ones([self.codes.size(1)])
        parts = torch.split(x_MK, self.codes.size(2), 1)
        y = torch._weight_int8pack_mm(parts[0].contiguous(), self.codes[0], ones) * self.scales[0]
        for block in range(1, len(parts)):
            part = torch._weight_int8pack_mm(parts[block].contiguous(), self.codes[block], ones)
            y.addcmul_(part, self.scales[block])
        return y

    def multiply_many_rows(self, x_MK: Tensor) -> Tensor:
        """Multiply [M, K] to [M, N] float32 with dequantized codes."""
        # Without bfloat16 instructions, torch's bfloat16 products take ten times as long.
        if x_MK.is_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            x_MK = x_MK.float()
        parts: list[Tensor] = []
        for start in range(0, self.codes.size(1), self.dequantized_outputs):
            stop = start + self.dequantized_outputs
            scales = self.scales[:, start:stop]
            floats = self.codes[:, start:stop] * scales.unsqueeze(2)
            weight = floats.to(x_MK.dtype).transpose(0, 1).reshape(scales.size(1), -1)
            parts.append(F.linear(x_MK, weight).float())
        return torch.cat(parts, 1)

    @torch.jit.export
    def rows(self, ids: Tensor) -> Tensor:
        """Look up [B, T] row numbers as [B, T, K] bfloat16."""
        flat = ids.flatten()
        scales = self.scales.index_select(1, flat).unsqueeze(2)
        found = (self.codes.index_select(1, flat) * scales).transpose(0, 1)
        return found.reshape(ids.size(0), ids.size(1), -1).to(torch.bfloat16)
