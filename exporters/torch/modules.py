"""Modules that stand in for the reference's in a TorchScript archive.

Projections are packed, matrices are TorchScript's own (:mod:`.torchscript_matrix`), and nothing
bakes the exporting machine's device into the graph.

Shapes: B batch rows, T new tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from gemma3_export.config.gemma3_config import EMBEDDING, HEAD, Gemma3Config
from gemma3_export.exporters.packing import PackedAttention, PackedMLP, PackedProjection
from gemma3_export.reference.model import (
    Attention,
    Gemma3,
    LMHead,
    RotaryEmbedding,
    ScaledEmbedding,
)
from gemma3_export.reference.weights.block_matrix import BlockMatrix, in_blocks

__all__ = [
    "BlockedMatrix",
    "Matrix",
    "PlainMatrix",
    "TorchScriptGemma3",
    "install_matrices",
]


class MatrixProjection(PackedProjection):
    """A projection whose weight becomes a :class:`Matrix` once it is loaded."""

    matrix: nn.Module

    def product(self, x: Tensor) -> Tensor:
        """[B, T, in] to [B, T, sum of out_features]."""
        return self.matrix(x)  # type: ignore[no-any-return]


class MatrixEmbedding(ScaledEmbedding):
    """Token embedding out of a :class:`Matrix` that it shares with the head."""

    matrix: nn.Module
    scale: float  # sqrt(D) rounded to the weights' dtype

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B, T] token ids to [B, T, D]; a tensor for the scale would be bound to a device."""
        return self.matrix.rows(ids_BT) * self.scale  # type: ignore[no-any-return,operator]


class MatrixHead(LMHead):
    """Logits out of a :class:`Matrix`."""

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.matrix = matrix

    def product(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, V]."""
        del weight_VD
        return self.matrix(x)  # type: ignore[no-any-return]


class BlockedHead(MatrixHead):
    """Logits out of a :class:`BlockedMatrix`, which has them in float32."""

    def product(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, V]."""
        del weight_VD
        return self.matrix.wide(x)  # type: ignore[no-any-return,operator]


class StoredRotary(RotaryEmbedding):
    """Frequencies as a buffer: a trace would bake the device that computes them into the graph."""

    frequencies: Tensor

    def inverse_frequencies(self, device: torch.device) -> Tensor:
        """[H/2] float32 radians a position."""
        del device
        return self.frequencies


class TorchScriptGemma3(Gemma3):
    """The reference with packed projections; weights are loaded before matrices are installed."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config)
        self.model.embed_tokens = MatrixEmbedding(config.vocab_size, config.hidden_size)
        for layer in self.model.layers:
            assert isinstance(layer.self_attn, Attention)
            layer.self_attn = PackedAttention(layer.self_attn, MatrixProjection)
            layer.mlp = PackedMLP(config, MatrixProjection)
        for kind in self.rotary:
            self.rotary[kind] = StoredRotary(config, kind)  # type: ignore[arg-type]

    @property
    def head_weight(self) -> Tensor:
        """The head has its own matrix, so nothing needs to be handed to it."""
        return torch.empty(0)


def blocked_matrix(matrix: BlockMatrix) -> BlockedMatrix:
    """As an archive stores it: blocks outermost, codes around zero."""
    codes = (matrix.codes.to(torch.int16) - matrix.format.zero_point).to(torch.int8)
    codes = in_blocks(codes, matrix.format).transpose(0, 1)
    return BlockedMatrix(codes.contiguous(), matrix.scales.t().contiguous())


def install_matrices(
    model: TorchScriptGemma3, blocks: Mapping[str, BlockMatrix], *, prepack: bool
) -> None:
    """Turn loaded weights into matrices, ready for tracing.

    Args:
        model: with its weights in place.
        blocks: those that are quantised, by the parameter's name.
        prepack: let the archive pack its float matrices when it is loaded.
    """
    plain: Callable[[Tensor, bool], nn.Module] = Matrix if prepack else PlainMatrix

    def make(name: str, weight: Tensor, keeps_rows: bool) -> nn.Module:
        matrix = blocked_matrix(blocks[name]) if name in blocks else plain(weight, keeps_rows)
        scripted: nn.Module = torch.jit.script(matrix)
        return scripted

    for rotary in model.rotary.values():
        assert isinstance(rotary, StoredRotary)
        frequencies = RotaryEmbedding.inverse_frequencies(rotary, torch.device("cpu"))
        rotary.register_buffer("frequencies", frequencies)
    for path, module in model.named_modules():
        if isinstance(module, MatrixProjection):
            module.matrix = make(f"{path}.weight", module.weight.data, False)
            del module.weight
    embedding = model.model.embed_tokens
    assert isinstance(embedding, MatrixEmbedding)
    table = make(EMBEDDING, embedding.weight.data, True)
    embedding.matrix = table
    scale = torch.tensor(embedding.hidden_size**0.5, dtype=torch.float32)
    embedding.scale = float(scale.to(embedding.weight.dtype))
    if model.config.tie_word_embeddings:
        name, head = EMBEDDING, table
    else:
        name, head = HEAD, make(HEAD, model.lm_head.weight.data, False)
        del model.lm_head
    model.head = BlockedHead(head) if name in blocks else MatrixHead(head)
    del embedding.weight


# Matrices that lay themselves out for the CPU when an archive is loaded.
#
# They are stored plainly. On loading, in Python and in C++ alike, ``__setstate__`` reorders a
# float32
# matrix on a CPU for oneDNN, whose one-row product then reads memory two to three times as fast as
# torch's own. On other devices and in half precision the plain matrix is used.
#
# A quantised matrix is read as it is stored, so the embedding's rows and the head share its one
# copy.
#
# TorchScript compiles these classes, so they may only use what that language has; it resolves
# annotations itself, which is why this module must not defer them.

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
