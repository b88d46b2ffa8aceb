"""What is trained: the reference model from token windows to one number."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.training.loss import chunked_cross_entropy

__all__ = ["LossModule", "compute_dtype_of"]


def compute_dtype_of(precision: str) -> torch.dtype:
    """The element type of matrix products."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class LossModule(nn.Module):
    """The model's mean cross-entropy over full windows; DDP and FSDP wrap this.

    Args:
        model: with float32 weights.
        compute_dtype: of matrix products and attention.
        loss_chunk_tokens: see :func:`chunked_cross_entropy`.
        gradient_checkpointing: keep only the layers' inputs for the backward pass.
    """

    def __init__(
        self,
        model: Gemma3,
        *,
        compute_dtype: torch.dtype,
        loss_chunk_tokens: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        self.loss_chunk_tokens = loss_chunk_tokens
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """[B, T] tokens and the tokens that follow them to the mean loss, float32."""
        device = input_ids.device.type
        is_mixed = self.compute_dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device, dtype=self.compute_dtype, enabled=is_mixed):
            x_BTD = self.hidden_states(input_ids)
        return chunked_cross_entropy(
            x_BTD.flatten(0, 1),
            self.model.head_weight,
            labels.flatten(),
            chunk_tokens=self.loss_chunk_tokens,
            compute_dtype=self.compute_dtype,
        )

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[B, T] to [B, T, D] after the final norm, without a cache."""
        decoder, kinds = self.model.model, self.model.config.layer_types
        # No row has padding, so one row's angles and masks serve all.
        contexts = self.model.layer_contexts(input_ids[:1], None, None)
        x_BTD: Tensor = decoder.embed_tokens(input_ids)
        for layer, kind in zip(decoder.layers, kinds, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTD, _ = checkpoint(layer, x_BTD, contexts[kind], None, use_reentrant=False)
            else:
                x_BTD, _ = layer(x_BTD, contexts[kind], None)
        normed: Tensor = decoder.norm(x_BTD)
        return normed
