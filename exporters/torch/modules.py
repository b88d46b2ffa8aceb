"""The modules that replace those of the reference in a TorchScript archive.

Projections are packed, matrices are those of :mod:`gemma3_export.exporters.torch.matrix`, and no
module bakes the device of the exporting machine into the graph.

Shapes: B batch rows, T new tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gemma3_export.config import EMBEDDING, HEAD, Gemma3Config
from gemma3_export.exporters.packed_projections import PackedAttention, PackedMLP, PackedProjection
from gemma3_export.exporters.torch.matrix import BlockedMatrix, Matrix, PlainMatrix
from gemma3_export.reference.model import (
    Attention,
    Gemma3,
    LMHead,
    RotaryEmbedding,
    ScaledEmbedding,
)
from gemma3_export.reference.weights.block_matrix import BlockMatrix, in_blocks

__all__ = ["TorchScriptGemma3", "install_matrices"]


class MatrixProjection(PackedProjection):
    """A projection whose weight becomes a :class:`Matrix` after loading."""

    matrix: nn.Module

    def product(self, x: Tensor) -> Tensor:
        """Multiply [B, T, in] to [B, T, sum of out_features]."""
        return self.matrix(x)  # type: ignore[no-any-return]


class MatrixEmbedding(ScaledEmbedding):
    """Token embedding that can share its :class:`Matrix` with the head."""

    matrix: nn.Module
    scale: float  # sqrt(D) rounded to the weights' dtype

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embed [B, T] token ids as [B, T, D]; a scale tensor would be bound to a device."""
        return self.matrix.rows(ids_BT) * self.scale  # type: ignore[no-any-return,operator]


class MatrixHead(LMHead):
    """Head that computes logits with a :class:`Matrix`."""

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.matrix = matrix

    def product(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """Multiply [B, T, D] to [B, T, V]."""
        del weight_VD
        return self.matrix(x)  # type: ignore[no-any-return]


class BlockedHead(MatrixHead):
    """Head that computes logits with a :class:`BlockedMatrix`, in float32."""

    def product(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """Multiply [B, T, D] to [B, T, V]."""
        del weight_VD
        return self.matrix.forward_float32(x)  # type: ignore[no-any-return,operator]


class StoredRotary(RotaryEmbedding):
    """Rotary embedding with frequencies as a buffer, so that a trace bakes no device in."""

    frequencies: Tensor

    def inverse_frequencies(self, device: torch.device) -> Tensor:
        """Return the frequencies, [H/2] float32 radians per position."""
        del device
        return self.frequencies


class TorchScriptGemma3(Gemma3):
    """The reference with packed projections; load weights before installing matrices."""

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
        """An empty tensor, because the head has its own matrix."""
        return torch.empty(0)


def blocked_matrix(matrix: BlockMatrix) -> BlockedMatrix:
    """Return ``matrix`` in the layout of archives: blocks outermost, signed codes."""
    codes = (matrix.codes.to(torch.int16) - matrix.format.zero_point).to(torch.int8)
    codes = in_blocks(codes, matrix.format).transpose(0, 1)
    return BlockedMatrix(codes.contiguous(), matrix.scales.t().contiguous())


def install_matrices(
    model: TorchScriptGemma3, blocks: Mapping[str, BlockMatrix], *, prepack: bool
) -> None:
    """Replace loaded weights with matrices, ready for tracing.

    Args:
        model: with loaded weights.
        blocks: quantized matrices by parameter name.
        prepack: make float matrices prepack themselves when the archive is loaded.
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
