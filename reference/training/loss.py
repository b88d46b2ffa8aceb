"""Compute cross-entropy over a large vocabulary without materializing all logits.

For 32 sequences of 128 tokens and a vocabulary of 262,144, float32 logits take 4 GB, and so do
their gradients. Here both exist for one chunk of tokens at a time. The gradients of hidden states
and head are computed in the forward pass, so nothing is computed twice.

Shape suffixes: N tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemma3_export.reference.model import Gemma3, RunLayer
from gemma3_export.reference.training.token_data import IGNORED_LABEL

__all__ = ["LossModule", "chunked_cross_entropy"]


def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int,
    compute_dtype: torch.dtype,
    divisor: Tensor | None = None,
) -> Tensor:
    """Return the mean of ``-log softmax(x @ weight.T)[label]`` over tokens with a label.

    Args:
        x_ND: hidden states after the final norm.
        weight_VD: weight of the head.
        labels_N: int64 token ids; -100 is ignored.
        chunk_tokens: tokens whose logits are in memory at once.
        compute_dtype: dtype of the matrix products; softmax and sums use float32 or wider.
        divisor: what to divide the sum by, a scalar; None is the number of tokens with a label.
    """
    # Grad mode is always off inside the autograd function, so it is read here.
    needs_gradient = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    loss = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        x_ND, weight_VD, labels_N, chunk_tokens, compute_dtype, needs_gradient, divisor
    )
    return cast("Tensor", loss)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        compute_dtype: torch.dtype,
        needs_gradient: bool,
        divisor: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(compute_dtype, torch.float32)
        grad_x_ND = torch.empty_like(x_ND, dtype=wide) if needs_gradient else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_gradient else None
        total = x_ND.new_zeros((), dtype=wide)
        kept_N = labels_N != IGNORED_LABEL
        with torch.autocast(x_ND.device.type, enabled=False):
            head_VD = weight_VD.to(compute_dtype)
            for start in range(0, x_ND.shape[0], chunk_tokens):
                part = slice(start, start + chunk_tokens)
                x_CD, kept_C = x_ND[part].to(compute_dtype), kept_N[part]
                target_C1 = labels_N[part].clamp(min=0)[:, None]
                logits_CV = (x_CD @ head_VD.T).to(wide)
                log_normalizer_C1 = logits_CV.logsumexp(1, keepdim=True)
                losses_C = (log_normalizer_C1 - logits_CV.gather(1, target_C1))[:, 0]
                total = total + (losses_C * kept_C).sum()
                if grad_x_ND is None or grad_VD is None:
                    continue
                # The gradient of the sum is softmax minus one-hot, which fits half precision. That
                # of the mean may underflow, so the division happens in the backward pass.
                grad_CV = (logits_CV.sub_(log_normalizer_C1)).exp_()
                grad_CV.scatter_add_(1, target_C1, -torch.ones_like(log_normalizer_C1))
                grad_CV = (grad_CV * kept_C[:, None]).to(compute_dtype)
                grad_x_ND[part] = grad_CV @ head_VD
                grad_VD += grad_CV.T @ x_CD
        if divisor is None:
            divisor = kept_N.sum().clamp(min=1)
        if needs_gradient:
            ctx.save_for_backward(grad_x_ND, grad_VD, divisor)
            ctx.dtypes = x_ND.dtype, weight_VD.dtype
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_VD, divisor = ctx.saved_tensors
        scale = grad_outputs[0] / divisor
        x_dtype, weight_dtype = ctx.dtypes
        grads = (grad_x_ND * scale).to(x_dtype), (grad_VD * scale).to(weight_dtype)
        return (*grads, None, None, None, None, None)


class LossModule(nn.Module):
    """The model and its training loss in one module, which DDP and FSDP wrap.

    Args:
        model: the model in float32.
        compute_dtype: dtype of matrix products and attention.
        loss_chunk_tokens: see :func:`chunked_cross_entropy`.
        gradient_checkpointing: keep only the inputs of the layers for the backward pass.
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

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss in float32.

        Args:
            input_ids: [B, T] int64, with padding only after the last label.
            labels: [B, T] int64 next tokens; -100 is ignored.
            documents: [B, T] int64; tokens see only those with the same number. None: see all.
            divisor: see :func:`chunked_cross_entropy`. Micro-batches and processes have different
                numbers of labels, so the mean of their means is not the mean over all labels.
        """
        device = input_ids.device.type
        is_mixed = self.compute_dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device, dtype=self.compute_dtype, enabled=is_mixed):
            x_BTD, _ = self.model.hidden_states(
                input_ids, use_cache=False, run_layer=self._run_layer(), documents=documents
            )
        return chunked_cross_entropy(
            x_BTD.flatten(0, 1),
            self.model.head_weight,
            labels.flatten(),
            chunk_tokens=self.loss_chunk_tokens,
            compute_dtype=self.compute_dtype,
            divisor=divisor,
        )

    def _run_layer(self) -> RunLayer | None:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return partial(checkpoint, use_reentrant=False)
        return None
