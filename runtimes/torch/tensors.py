"""Torch devices, dtypes and tensors in this package's terms, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma3_export.device import Device, parse_device
from gemma3_export.dtypes import DType, element_type
from gemma3_export.errors import UnavailableError
from gemma3_export.runtimes.protocol import IntArray

__all__ = ["as_numpy", "device_of", "dtype_of", "to_device", "torch_device"]


def torch_device(name: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: the name is unknown.
        UnavailableError: CUDA was requested and torch finds no such GPU.
    """
    wanted = parse_device(name)
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.kind == "cuda" and not wanted.index < torch.cuda.device_count():
        raise UnavailableError(
            f"{wanted} was requested, but torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} GPUs; `gemma3-export doctor --runtime torchscript` shows "
            "what is missing and how to install it, or pass --device cpu"
        )
    return torch.device(str(wanted))


def device_of(device: torch.device) -> Device:
    """Return ``device`` as the command line names it; CUDA without an index is the first GPU."""
    return Device(device.type, device.index or 0)


def dtype_of(dtype: torch.dtype) -> DType:
    """Return the element type that torch calls ``dtype``."""
    return element_type(str(dtype).removeprefix("torch.")).name


def to_device(array: IntArray, device: torch.device) -> Tensor:
    """Copy ``array`` to ``device``, asynchronously on CUDA."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def as_numpy(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a host copy in float32, or in float64 if the tensor is float64."""
    if tensor.dtype != torch.float64:
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()
