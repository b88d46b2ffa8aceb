"""The modules that replace those of the reference in an ONNX trace.

Each computes the same function as the module it replaces, in a form that ONNX Runtime has a fast
kernel for: projections packed into one matrix product, attention as one fused operator. The parity
check compares them with the reference.

In float16, matrices and the activations between products are half, but norms and the residual
stream are float32: values there overflow (the real 270M reaches 104,000). In bfloat16, the residual
stream is bfloat16 too, as in the reference and in Hugging Face's models.

Shapes: B batch rows, T new tokens, S all tokens, D hidden size, C vocabulary or feature columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor
from torch.onnx import ops

from gemma3_export.config import Gemma3Config
from gemma3_export.exporters.onnx.stack_layers import layer_boundary
from gemma3_export.exporters.packed_projections import PackedAttention, PackedMLP, PackedProjection
from gemma3_export.reference.model import (
    DecoderLayer,
    Gemma3,
    KeyValue,
    LastTokens,
    LayerContext,
    LMHead,
    RMSNorm,
    ScaledEmbedding,
)

__all__ = ["FusedGemma3", "PortableGemma3"]

SLICE_TO_END = torch.iinfo(torch.int64).max


class OnnxProjection(PackedProjection):
    """A product with a matrix stored input-major, so that the graph needs no transposition."""

    is_transposed = True

    def product(self, x: Tensor) -> Tensor:
        """[B, T, in] to [B, T, sum of out_features]."""
        return x @ self.weight

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Cast ``x`` to the matrix's element type; see :class:`PackedProjection`."""
        return super().forward(x.to(self.weight.dtype))

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Split in one node; torch's own split becomes a sequence and one node per part."""
        shapes = [(*y.shape[:-1], size) for size in self.out_features]
        return tuple(
            ops.symbolic_multi_out(
                "Split",
                [y, torch.tensor(self.out_features)],
                {"axis": -1},
                dtypes=[y.dtype] * len(shapes),
                shapes=shapes,
                version=18,
            )
        )


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshape [B, T, C] to [B, T, C/H, H] in one node; ``view`` would compute its shape first."""
    shape = (*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
    return reshape(x, [0, 0, -1, head_dim], shape)


def merge_heads(x: Tensor) -> Tensor:
    """Reshape [B, T, N, H] to [B, T, N*H] in one node."""
    return reshape(x, [0, 0, -1], (*x.shape[:2], x.shape[2] * x.shape[3]))


def reshape(x: Tensor, target: Sequence[int], shape: Sequence[int | torch.SymInt]) -> Tensor:
    """Apply ONNX Reshape: in ``target``, 0 copies a size and -1 is inferred."""
    return ops.symbolic(
        "Reshape", [x, torch.tensor(target)], dtype=x.dtype, shape=shape, version=21
    )


@dataclass(kw_only=True)
class FusedContext:
    """GroupQueryAttention's inputs in place of masks and rotary angles."""

    cos: Tensor  # [max_position_embeddings, H/2] the whole table
    sin: Tensor
    last_index: Tensor  # [B] int32 number of tokens in each row, minus one
    total: Tensor  # [] int32 length of the longest row
    attention_mask: Tensor  # [B, S]


class FusedAttention(PackedAttention):
    """Attention with rotation, cache update and window in one GroupQueryAttention node."""

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, context: FusedContext, past: KeyValue
    ) -> tuple[Tensor, KeyValue]:
        """Attend as the reference does; row lengths are sums of the mask, so pad on the right.

        See :mod:`gemma3_export.exporters.onnx.left_padding` for rows that are padded on the left.
        """
        config = self.config
        batch, new = x_BTD.shape[:2]
        q, k, v = self.project(x_BTD)
        q = merge_heads(self.q_norm(split_heads(q, config.head_dim)))
        k = merge_heads(self.k_norm(split_heads(k, config.head_dim)))
        cache = (
            batch,
            config.num_key_value_heads,
            context.attention_mask.shape[1],
            config.head_dim,
        )
        out, key, value = ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [q, k, v, *past, context.last_index, context.total, context.cos, context.sin],
            {
                "num_heads": config.num_attention_heads,
                "kv_num_heads": config.num_key_value_heads,
                "scale": config.attention_scale,
                "local_window_size": config.sliding_window if config.is_sliding(self.layer) else -1,
                "do_rotary": 1,
            },
            dtypes=[q.dtype] * 3,
            shapes=[(batch, new, config.query_size), cache, cache],
            version=1,
        )
        return self.o_proj(out), (key, value)


class FloatNorm(RMSNorm):
    """A norm that returns float32, for the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of ``x``."""
        return super().forward(x.float())


class FloatEmbedding(ScaledEmbedding):
    """Token embedding that returns float32, for the residual stream."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embed [B, T] token ids as [B, T, D] float32; round the scale to the weights' type."""
        scale = torch.tensor(self.hidden_size**0.5, dtype=torch.float32)
        return self.lookup(ids_BT).float() * scale.to(self.weight.dtype).float()


class MarkedLayer(DecoderLayer):
    """A layer that marks its input, so that a pass can cut the layer out of the trace."""

    def widen_residual(self, config: Gemma3Config) -> None:
        """Hold the residual stream in float32."""
        size, eps = config.hidden_size, config.rms_norm_eps
        self.post_attention_layernorm = FloatNorm(size, eps)
        self.post_feedforward_layernorm = FloatNorm(size, eps)

    def forward(
        self, x: Tensor, context: LayerContext, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Mark ``x`` and run the reference's layer."""
        return super().forward(layer_boundary(x), context, past)


class SliceLastTokens(LastTokens):
    """``x[:, -count:]`` with ``count`` as a graph input; 0 keeps all of T tokens, -T none."""

    def forward(self, x_BTD: Tensor, count: Tensor | int) -> Tensor:
        """Slice [B, T, D] to [B, count, D]; the trace claims T, and a pass drops that shape."""
        assert isinstance(count, Tensor)
        x_BTD = layer_boundary(x_BTD)  # the end of the last layer
        end, axis = torch.tensor([SLICE_TO_END]), torch.tensor([1])
        # Compute -count from a size: arithmetic on sizes stays on the CPU, where Slice needs its
        # bounds on CUDA too. A plain negation would run on the GPU and be copied back.
        size = ops.symbolic(
            "Shape", [x_BTD], {"start": 1, "end": 2}, dtype=torch.int64, shape=[1], version=21
        )
        start = size - count - size
        return ops.symbolic(
            "Slice", [x_BTD, start, end, axis], dtype=x_BTD.dtype, shape=x_BTD.shape, version=13
        )


class GemmHead(LMHead):
    """Logits from a two-dimensional product, which reads the embedding untransposed.

    This lets the embedding and the head share one stored matrix.
    """

    def forward(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """Project [B, T, D] to [B, T, V] float32."""
        # Read sizes in the graph: the traced ones ignore num_logits_to_keep.
        vocab_size, hidden_size = weight_VD.shape
        rows = reshape(x, [-1, hidden_size], (x.shape[0] * x.shape[1], hidden_size))
        rows = rows.to(weight_VD.dtype)
        sizes = ops.symbolic("Shape", [x], {"end": 2}, dtype=torch.int64, shape=[2], version=21)
        target = torch.cat((sizes, torch.tensor([vocab_size])))
        product = F.linear(rows, weight_VD)
        logits = ops.symbolic(
            "Reshape",
            [product, target],
            {"allowzero": 1},  # so that there may be no tokens
            dtype=product.dtype,
            shape=(*x.shape[:2], vocab_size),
            version=21,
        )
        return logits.float()  # last: a Reshape whose output a caller has bound would be a copy


class PortableGemma3(Gemma3):
    """The reference in standard operators, for any ONNX runtime and padding on either side.

    Args:
        config: the model.
        has_wide_residual: hold the residual stream in float32, whatever the matrices' dtype.
    """

    attention: type[PackedAttention] = PackedAttention

    def __init__(self, config: Gemma3Config, *, has_wide_residual: bool = True) -> None:
        super().__init__(config)
        if has_wide_residual:
            self.model.embed_tokens = FloatEmbedding(config.vocab_size, config.hidden_size)
        self.last_tokens = SliceLastTokens()
        self.head = GemmHead()
        for index in range(config.num_hidden_layers):
            layer = MarkedLayer(config, index)
            if has_wide_residual:
                layer.widen_residual(config)
            layer.self_attn = self.attention(layer.self_attn, OnnxProjection)
            layer.mlp = PackedMLP(config, OnnxProjection)
            self.model.layers[index] = layer

    def round_matrices(self, dtype: torch.dtype) -> None:
        """Cast matrices to ``dtype``; vectors (the norm weights) stay float32."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)


class FusedGemma3(PortableGemma3):
    """The reference with ONNX Runtime's fused attention, for rows that start with a token."""

    attention = FusedAttention

    def layer_contexts(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Sequence[KeyValue],
    ) -> dict[str, FusedContext]:
        """Return rotary tables and row lengths; runtimes fold the tables into constants on load."""
        positions = torch.arange(self.config.max_position_embeddings)
        last_index = (attention_mask.sum(1) - 1).to(torch.int32)
        total = torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)
        contexts = {}
        for kind, rotary in self.rotary.items():
            cos, sin = rotary(positions)
            contexts[kind] = FusedContext(
                cos=cos.to(self.head_weight.dtype),  # the attention's element type
                sin=sin.to(self.head_weight.dtype),
                last_index=last_index,
                total=total,
                attention_mask=attention_mask,
            )
        return contexts
