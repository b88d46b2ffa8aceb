"""Matrices that lay themselves out for the CPU when an archive is loaded.

They are stored plainly. On loading, in Python and in C++ alike, ``__setstate__`` reorders a float32
matrix on a CPU for oneDNN, whose one-row product then reads memory two to three times as fast as
torch's own. On other devices and in half precision the plain matrix is used.

A quantised matrix is read as it is stored, so the embedding's rows and the head share its one copy.

TorchScript compiles these classes, so they may only use what that language has; it resolves
annotations itself, which is why this module must not defer them.
"""

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

__all__ = ["BlockedMatrix", "Matrix", "PlainMatrix"]

FEW_ROWS = 16  # above, turning codes into floats costs less than the kernel for few rows loses
CHUNK = 16_384  # outputs that are turned into floats at once


class Matrix(nn.Module):
    """``x @ weight.T``, and rows of ``weight``; packs itself when it is loaded on a CPU.

    This class is compiled by TorchScript: it may only use what that language has.
    """

    weight: Tensor
    packed: Tensor
    is_packed: bool
    keeps_rows: bool

    def __init__(self, weight: Tensor, keeps_rows: bool) -> None:
        super().__init__()
        self.weight = weight  # [out, in]
        self.packed = torch.empty(0)
        self.is_packed = False
        self.keeps_rows = keeps_rows  # an embedding needs its rows beside the packed layout

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, self.weight)

    @torch.jit.export
    def rows(self, ids: Tensor) -> Tensor:
        """[B, T] row numbers to [B, T, in]."""
        return F.embedding(ids, self.weight)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool, bool]:
        """What the archive stores."""
        return self.weight, self.keeps_rows, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool, bool]) -> None:
        """Called when the archive is loaded, with the weight already on its device."""
        self.weight = state[0]
        self.keeps_rows = state[1]
        self.training = state[2]
        self.packed = torch.empty(0)
        self.is_packed = False
        if self.weight.is_cpu and self.weight.dtype == torch.float32:
            # The layout for 512 rows was as fast as any for one row, and faster for 2 to 8.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 512)
            self.is_packed = True
            if not self.keeps_rows:
                self.weight = torch.empty(0)


class PlainMatrix(nn.Module):
    """As :class:`Matrix`, for torch builds without oneDNN: nothing is packed."""

    weight: Tensor

    def __init__(self, weight: Tensor, keeps_rows: bool) -> None:
        super().__init__()
        del keeps_rows
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.weight)

    @torch.jit.export
    def rows(self, ids: Tensor) -> Tensor:
        """[B, T] row numbers to [B, T, in]."""
        return F.embedding(ids, self.weight)


class BlockedMatrix(nn.Module):
    """A matrix of 8-bit blocks; inputs and outputs are bfloat16, blocks are summed in float32.

    A few rows are multiplied by torch's kernel for 8-bit weights, one block of columns at a time:
    it knows one scale for each output only. Many rows are multiplied by floats made of the codes.

    Shapes: M rows, N outputs, K inputs, G blocks.
    """

    codes: Tensor
    scales: Tensor
    few_rows: int
    chunk: int

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)  # [G, N, block] int8, around zero
        self.register_buffer("scales", scales)  # [G, N] float32
        self.few_rows = FEW_ROWS
        self.chunk = CHUNK

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        return self.wide(x).to(x.dtype)

    @torch.jit.export
    def wide(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] float32, for logits: the sums are that already."""
        x_MK = x.reshape(-1, x.size(-1))
        y = self.of_few(x_MK) if x.is_cpu and x_MK.size(0) <= self.few_rows else self.of_many(x_MK)
        shape = list(x.shape)
        shape[-1] = y.size(-1)
        return y.view(shape)

    def of_few(self, x_MK: Tensor) -> Tensor:
        """[M, K] to [M, N] float32."""
        ones = x_MK.new_ones([self.codes.size(1)])  # scales stay float32, and out of the kernel
        parts = torch.split(x_MK, self.codes.size(2), 1)
        y = torch._weight_int8pack_mm(parts[0].contiguous(), self.codes[0], ones) * self.scales[0]
        for block in range(1, len(parts)):
            part = torch._weight_int8pack_mm(parts[block].contiguous(), self.codes[block], ones)
            y.addcmul_(part, self.scales[block])
        return y

    def of_many(self, x_MK: Tensor) -> Tensor:
        """[M, K] to [M, N] float32."""
        # Without instructions for bfloat16, torch's products of it took ten times as long.
        if x_MK.is_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            x_MK = x_MK.float()
        parts: list[Tensor] = []
        for start in range(0, self.codes.size(1), self.chunk):
            scales = self.scales[:, start : start + self.chunk]
            floats = self.codes[:, start : start + self.chunk] * scales.unsqueeze(2)
            weight = floats.to(x_MK.dtype).transpose(0, 1).reshape(scales.size(1), -1)
            parts.append(F.linear(x_MK, weight).float())
        return torch.cat(parts, 1)

    @torch.jit.export
    def rows(self, ids: Tensor) -> Tensor:
        """[B, T] row numbers to [B, T, K]."""
        flat = ids.flatten()
        scales = self.scales.index_select(1, flat).unsqueeze(2)
        found = (self.codes.index_select(1, flat) * scales).transpose(0, 1)
        return found.reshape(ids.size(0), ids.size(1), -1).to(torch.bfloat16)
