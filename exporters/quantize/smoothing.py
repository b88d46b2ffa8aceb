"""Divide activations by a factor per channel before they are rounded, and multiply the weights.

Rounding a row with one scale loses most where a few channels are far larger than the others. A
factor for each channel moves part of that range into the weights (SmoothQuant, Xiao et al.,
arXiv:2211.10438): ``s = sqrt(max|x| / max|w|)``, so that both have the same range. It costs nothing
at run time, because the graph divides constants: the scale of the norm that a product follows, or
the scales of the weights that computed its input.

Shapes: K inputs, T tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.sequences import sequences_for
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import LayerwiseForward
from gemma3_export.reference.weights import WeightSource
from gemma3_export.tokenizer import Tokenizer

__all__ = ["measure_smoothing", "smoothing_factors"]

# Products of a layer that share an input.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LARGEST_FACTOR = 64.0  # relative to the mean, and its inverse: a channel may be idle in the text


@torch.inference_mode()
def measure_smoothing(
    source: WeightSource, tokenizer: Tokenizer | None, progress: Progress
) -> dict[str, Tensor]:
    """Return the factors [K] of the matrices that can be smoothed, by canonical name.

    Activations are those of the reference over the sequences of the parity check: random tokens,
    and short texts if there is a tokenizer. The held-out text is not among them.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """
    stage = "measuring activations"
    sequences = sequences_for(source.config, VerifyOptions(), tokenizer)
    forward = LayerwiseForward(source, [torch.from_numpy(item.ids)[None] for item in sequences])
    found: dict[str, Tensor] = {}
    for index, layer in forward.layers():
        progress(stage, index, source.config.num_hidden_layers)
        largest = {group: torch.zeros(1) for group in GROUPS}
        hooks = [
            layer.get_submodule(group[0]).register_forward_pre_hook(
                partial(_record, largest, group)
            )
            for group in GROUPS
        ]
        for batch in range(len(sequences)):
            forward.step(batch)
        for hook in hooks:
            hook.remove()
        for group in GROUPS:
            sizes = [layer.get_parameter(f"{name}.weight").abs().amax(0) for name in group]
            factors = smoothing_factors(largest[group], torch.stack(sizes).amax(0))
            found |= {f"model.layers.{index}.{name}.weight": factors for name in group}
    progress(stage, source.config.num_hidden_layers, source.config.num_hidden_layers)
    return found


def _record(largest: dict[Any, Tensor], group: Any, module: nn.Module, inputs: Any) -> None:
    """Update the largest size of each channel of an input [1, T, K]."""
    del module
    largest[group] = torch.maximum(largest[group], inputs[0].abs().amax((0, 1)))


def smoothing_factors(activations: Tensor, weights: Tensor) -> Tensor:
    """Return the factor of each channel, from the largest sizes [K] of inputs and weights.

    Before the limit, the geometric mean of those in use is 1. Channels without any activation or
    weight are left as they are.
    """
    is_used = (activations > 0) & (weights > 0)
    ratio = torch.where(is_used, activations / weights, 1.0)
    logarithms = ratio.log() / 2
    mean = logarithms[is_used].mean() if is_used.any() else torch.zeros(())
    factors = (logarithms - mean).exp().clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return torch.where(is_used, factors, 1.0)
