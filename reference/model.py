"""Define the Gemma 3 model.

Shape suffixes: B batch rows, T new tokens, S all tokens (cached and new), N query heads,
K key-value heads, H head size, D hidden size, V vocabulary.

The order of operations and the precision of each follow the official implementation (Gemma Team,
"Gemma 3 Technical Report", arXiv:2503.19786, and Hugging Face's ``modeling_gemma3``). Parameter
names are those of Hugging Face, so official state dicts load unchanged. The exporters trace these
modules, after replacing some of them with equivalents for which a runtime has a kernel. The parity
check compares the result with this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from gemma3_export.config import Gemma3Config, LayerType

__all__ = [
    "MLP",
    "Attention",
    "DecoderLayer",
    "Gemma3",
    "Gemma3Output",
    "KeyValue",
    "LMHead",
    "LastTokens",
    "LayerContext",
    "RMSNorm",
    "RunLayer",
    "ScaledEmbedding",
]

KeyValue = tuple[Tensor, Tensor]  # key and value of one layer, each [B, K, S, H]


@dataclass(kw_only=True)
class Gemma3Output:
    """The result of a forward pass."""

    logits: Tensor  # [B, kept, V] float32 (float64 in a float64 model)
    past_key_values: list[KeyValue]  # one per layer, including the new tokens
    loss: Tensor | None = None  # mean cross-entropy; None without labels


@dataclass(kw_only=True)
class LayerContext:
    """Inputs that all layers of one type share in a forward pass.

    Without padding, all rows are alike, and B may be 1.
    """

    cos: Tensor  # [B, T, H/2] rotary cosines of the new tokens
    sin: Tensor  # [B, T, H/2]
    mask: Tensor  # [B, 1, T, S] added to the attention scores: 0 or a large negative number
    attention_mask: Tensor  # [B, S] 1 for tokens, 0 for padding


# Maps (layer, x, context, past) to the output of the layer and its extended cache.
RunLayer = Callable[[nn.Module, Tensor, LayerContext, KeyValue | None], tuple[Tensor, KeyValue]]


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32, as norms and logits need; keep float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """RMS normalization: ``x / rms(x) * (1 + weight)`` in float32, cast back at the end.

    From Zhang and Sennrich, arXiv:1910.07467. Gemma stores the scale minus one.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of ``x``."""
        scale = 1.0 + at_least_float32(self.weight)
        return F.rms_norm(at_least_float32(x), self.weight.shape, scale, self.eps).to(x.dtype)


class ScaledEmbedding(nn.Module):
    """Token embedding, multiplied by sqrt(hidden_size) rounded to the dtype of the weight."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.hidden_size = hidden_size

    def lookup(self, ids_BT: Tensor) -> Tensor:
        """Map token ids [B, T] to their unscaled embeddings [B, T, D]."""
        return F.embedding(ids_BT, self.weight)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Map token ids [B, T] to the residual stream [B, T, D]."""
        x_BTD = self.lookup(ids_BT)
        # Round to float32 first, as the official code does (640 gives 25.25 in bfloat16).
        scale = torch.tensor(self.hidden_size**0.5, dtype=torch.float32)
        return x_BTD * scale.to(x_BTD.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., arXiv:2104.09864) of one layer type.

    Sliding-window layers use ``rope_local_base_freq`` without scaling. Full-attention layers use
    ``rope_theta`` and divide positions by ``rope_scaling_factor``.
    """

    def __init__(self, config: Gemma3Config, layer_type: LayerType) -> None:
        super().__init__()
        is_sliding = layer_type == "sliding_attention"
        self.base = config.rope_local_base_freq if is_sliding else config.rope_theta
        self.scaling_factor = 1.0 if is_sliding else config.rope_scaling_factor
        self.head_dim = config.head_dim

    def inverse_frequencies(self, device: torch.device) -> Tensor:
        """Return [H/2] float32 radians per position, computed in float64 and rounded once.

        Float32 powers differ in their last bits between libraries and processors, and positions
        multiply the difference, so an export would not match the reference on another machine.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device)
        powers = self.base ** (exponents.double() / self.head_dim)
        return (1.0 / powers / self.scaling_factor).float()

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Map positions [...] to cosines and sines [..., H/2] in float32."""
        angles = positions[..., None].float() * self.inverse_frequencies(positions.device)
        return angles.cos(), angles.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head against each other; ``cos`` and ``sin`` are [B, T, H/2]."""
    first, second = x_BNTH.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x_BNTH.dtype), sin[:, None].to(x_BNTH.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with normalized queries and keys."""

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        hidden, query, key_value = config.hidden_size, config.query_size, config.key_value_size
        self.q_proj = nn.Linear(hidden, query, bias=False)
        self.k_proj = nn.Linear(hidden, key_value, bias=False)
        self.v_proj = nn.Linear(hidden, key_value, bias=False)
        self.o_proj = nn.Linear(query, hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, N*H], keys [B, T, K*H] and values [B, T, K*H]."""
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

    def forward(
        self,
        x_BTD: Tensor,
        context: LayerContext,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """Attend from the new tokens to all tokens; return [B, T, D] and the extended cache."""
        heads = (*x_BTD.shape[:2], -1, self.config.head_dim)
        q, k, v = self.project(x_BTD)
        q_BNTH = self.q_norm(q.view(heads)).transpose(1, 2)
        k_BKTH = self.k_norm(k.view(heads)).transpose(1, 2)
        v_BKTH = v.view(heads).transpose(1, 2)

        q_BNTH = rotate(q_BNTH, context.cos, context.sin)
        k_BKTH = rotate(k_BKTH, context.cos, context.sin)
        if past is not None:
            k_BKTH = torch.cat((past[0], k_BKTH), dim=2)
            v_BKTH = torch.cat((past[1], v_BKTH), dim=2)

        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH,
            k_BKTH,
            v_BKTH,
            attn_mask=context.mask,
            scale=self.config.attention_scale,
            # torch.onnx refuses grouping where every query head has a key head of its own.
            enable_gqa=self.config.num_attention_heads != self.config.num_key_value_heads,
        )
        out_BTD = out_BNTH.transpose(1, 2).flatten(2)
        return self.o_proj(out_BTD), (k_BKTH, v_BKTH)


class MLP(nn.Module):
    """Gated feed-forward network (GeGLU; Shazeer, arXiv:2002.05202) with tanh-approximated GELU."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate and up projections, each [B, T, intermediate_size]."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        gate, up = self.project(x)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each between two norms, added to the residual stream."""

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        x: Tensor,
        context: LayerContext,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the new residual stream [B, T, D] and the extended cache of the layer."""
        attended, present = self.self_attn(self.input_layernorm(x), context, past)
        x = x + self.post_attention_layernorm(attended)
        fed_forward = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed_forward), present


class LastTokens(nn.Module):
    """Selects the last tokens, whose logits are wanted."""

    def forward(self, x_BTD: Tensor, count: Tensor | int) -> Tensor:
        """Return the last ``count`` tokens of [B, T, D]; 0 keeps all of them, -T none."""
        return x_BTD[:, -count:]


class LMHead(nn.Module):
    """The language-modeling head, whose weight is that of the embedding if tied."""

    def product(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """Return ``x @ weight.T`` [B, T, V] in the dtype of the weight."""
        return F.linear(x, weight_VD)

    def forward(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """Return logits [B, T, V] in float32 or wider."""
        return at_least_float32(self.product(x, weight_VD))


class Decoder(nn.Module):
    """Embedding, layers and final norm, which official checkpoints call ``model``."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma3(nn.Module):
    """The Gemma 3 text model with its language-modeling head.

    The weights are uninitialized until :meth:`initialize` or a loader sets them.
    """

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.rotary = nn.ModuleDict(
            {kind: RotaryEmbedding(config, kind) for kind in sorted(set(config.layer_types))}
        )
        self.last_tokens = LastTokens()
        self.head = LMHead()
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Return the weight [V, D] of the head."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from N(0, initializer_range), and set norm weights to 0 (a scale of 1)."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
        *,
        num_logits_to_keep: Tensor | int = 0,
        labels: Tensor | None = None,
    ) -> Gemma3Output:
        """Run the new tokens, with or without a cache, and return logits and the extended cache.

        Args:
            input_ids: [B, T] int64 new tokens.
            attention_mask: [B, S] int64, 1 for tokens and 0 for padding, including cached tokens.
                Padding may be anywhere. None means no padding.
            past_key_values: one (key, value) per layer, each [B, K, S - T, H]; None means empty.
            num_logits_to_keep: number of last tokens to return logits for; 0 returns all, -T none.
            labels: [B, T] int64 token that each position should predict (already shifted); -100
                is ignored.
        """
        x_BTD, present = self.hidden_states(
            input_ids, attention_mask, past_key_values, num_tokens_to_keep=num_logits_to_keep
        )
        logits = self.head(x_BTD, self.head_weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Gemma3Output(logits=logits, past_key_values=present, loss=loss)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
        *,
        num_tokens_to_keep: Tensor | int = 0,
        use_cache: bool = True,
        run_layer: RunLayer | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return the input of the head, [B, kept, D] after the final norm, and the extended cache.

        Args:
            input_ids: [B, T] int64 new tokens.
            attention_mask: see :meth:`forward`.
            past_key_values: see :meth:`forward`.
            num_tokens_to_keep: number of last tokens to return; 0 returns all of them, -T none.
            use_cache: see :meth:`run_layers`.
            run_layer: see :meth:`run_layers`.
            documents: [B, T] int64 number of each token's document, without a cache: tokens see
                those of their own only. None means that there is only one.
        """
        contexts = self.layer_contexts(input_ids, attention_mask, past_key_values)
        if documents is not None:
            contexts = within_documents(contexts, documents)
        x_BTD, present = self.run_layers(
            self.model.embed_tokens(input_ids),
            contexts,
            past_key_values,
            use_cache=use_cache,
            run_layer=run_layer,
        )
        normed_BTD: Tensor = self.model.norm(self.last_tokens(x_BTD, num_tokens_to_keep))
        return normed_BTD, present

    def run_layers(
        self,
        x_BTD: Tensor,
        contexts: Mapping[str, LayerContext],
        past_key_values: Sequence[KeyValue] | None = None,
        *,
        layers: range | None = None,
        use_cache: bool = True,
        run_layer: RunLayer | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the residual stream through the decoder layers, without embedding or final norm.

        Args:
            x_BTD: input of the first layer.
            contexts: result of :meth:`layer_contexts`.
            past_key_values: see :meth:`forward`.
            layers: indices of the layers to run; None runs all of them.
            use_cache: False returns an empty cache, so that keys and values can be freed early.
            run_layer: called in place of each layer, for example to checkpoint gradients.
        """
        present: list[KeyValue] = []
        for index in range(self.config.num_hidden_layers) if layers is None else layers:
            layer = self.model.layers[index]
            context = contexts[self.config.layer_types[index]]
            past = None if past_key_values is None else past_key_values[index]
            if run_layer is None:
                x_BTD, key_value = layer(x_BTD, context, past)
            else:
                x_BTD, key_value = run_layer(layer, x_BTD, context, past)
            if use_cache:
                present.append(key_value)
        return x_BTD, present

    def layer_contexts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Sequence[KeyValue] | None,
    ) -> dict[str, LayerContext]:
        """Return the shared inputs of each layer type: rotary angles and masks.

        Positions count the ones of the attention mask, so padding never shifts a token.
        """
        new = input_ids.shape[1]
        if attention_mask is None:
            cached = 0 if past_key_values is None else past_key_values[0][0].shape[2]
            attention_mask = input_ids.new_ones(1, cached + new)  # broadcast to the batch
        key_positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        query_positions = key_positions[:, -new:]

        distance_BTS = query_positions[:, :, None] - key_positions[:, None, :]
        visible = (distance_BTS >= 0) & (attention_mask[:, None, :] != 0)
        contexts = {}
        for kind, rotary in self.rotary.items():
            if kind == "sliding_attention":  # the window includes the position of the query
                visible_here = visible & (distance_BTS < self.config.sliding_window)
            else:
                visible_here = visible
            cos, sin = rotary(query_positions)
            contexts[kind] = LayerContext(
                cos=cos,
                sin=sin,
                mask=additive_mask(visible_here[:, None], self.model.norm.weight.dtype),
                attention_mask=attention_mask,
            )
        return contexts


def within_documents(
    contexts: Mapping[str, LayerContext], documents_BT: Tensor
) -> dict[str, LayerContext]:
    """Hide other documents from each token, whose attention depends on distances alone."""
    is_own = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    return {
        kind: replace(
            context, mask=torch.minimum(context.mask, additive_mask(is_own, context.mask.dtype))
        )
        for kind, context in contexts.items()
    }


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where visible, else the most negative finite number of ``dtype`` (at most float32).

    Minus infinity would turn a row that sees nothing (padding) into NaN, which then spreads.
    """
    # torch.where of two Python numbers gives float32, which the lowest float64 would overflow.
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return torch.where(visible, 0.0, lowest).to(dtype)
