"""Create the AdamW optimizer, and compute the learning rate from the step number."""

from __future__ import annotations

import math

import torch
from torch import nn

from gemma3_export.reference.training.options import TrainOptions

__all__ = ["learning_rate", "make_optimizer", "set_learning_rate"]


def learning_rate(step: int, options: TrainOptions) -> float:
    """Return the learning rate of a step: linear warmup, then cosine decay to the minimum.

    Args:
        step: optimizer steps made so far; the next one uses the returned rate.
        options: peak and minimum rate, and both lengths in optimizer steps.
    """
    peak, lowest = options.learning_rate, options.min_learning_rate
    if step < options.warmup_steps:
        return peak * (step + 1) / options.warmup_steps
    length = max(1, options.steps - 1 - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / length)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Create AdamW (Loshchilov and Hutter, arXiv:1711.05101) for all weights of ``module``.

    Only matrices get weight decay. A norm weight w scales by 1 + w, and its optimum is not zero.
    """
    matrices = [weight for weight in module.parameters() if weight.ndim > 1]
    vectors = [weight for weight in module.parameters() if weight.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
