"""Fill the reference model from any source of weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.weights import WeightSource, check_finite

__all__ = ["load_module", "load_reference"]

Module = TypeVar("Module", bound=nn.Module)


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
    return load_module(model, "", source, dtype, device)


@torch.no_grad()
def load_module(
    module: Module,
    prefix: str,
    source: WeightSource,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Module:
    """A module of the reference, made on the meta device, with weights; ``prefix`` is its path.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for own_name, parameter in module.named_parameters():
        name, start = prefix + own_name, 0
        for chunk in source.chunks(name):
            check_finite(name, chunk)
            parameter[start : start + chunk.shape[0]] = chunk.to(dtype)
            start += chunk.shape[0]
    return module
