"""Matrices that lay themselves out for the CPU when an archive is loaded.

They are stored plainly. On loading, in Python and in C++ alike, ``__setstate__`` reorders a float32
matrix on a CPU for oneDNN, whose one-row product then reads memory two to three times as fast as
torch's own. On other devices and in half precision the plain matrix is used.

TorchScript compiles these classes, so they may only use what that language has; it resolves
annotations itself, which is why this module must not defer them.
"""

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

__all__ = ["Matrix", "PlainMatrix"]


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
