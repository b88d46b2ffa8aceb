"""Fill the reference model from any source of weights."""

from __future__ import annotations

import torch

from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.weights import WeightSource, check_finite

__all__ = ["load_reference"]


@torch.no_grad()
def load_reference(
    source: WeightSource,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Gemma3:
    """The reference model with the weights of ``source``, in evaluation mode.

    Weights are copied chunk by chunk, so the peak is the model itself and one chunk.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """
    with torch.device("meta"):
        model = Gemma3(source.config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        start = 0
        for chunk in source.chunks(name):
            check_finite(name, chunk)
            parameter[start : start + chunk.shape[0]] = chunk.to(dtype)
            start += chunk.shape[0]
    return model
