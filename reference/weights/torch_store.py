"""PyTorch state dicts (``.pt``, ``.pth``, ``.bin``): read without ever running their code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemma3_export.errors import InputError
from gemma3_export.reference.weights.stores import StoredTensor, TensorStore

__all__ = ["TorchStore"]

_WRAPPERS = ("model", "state_dict", "model_state_dict")
_CONFIGS = ("config", "model_config")
_CONFIG_MARKS = {"emb_dim", "model_type"}  # what tells a model's config from a trainer's


class TorchStore(TensorStore):
    """The tensors of a state dict; float64 is read as float32.

    Attributes:
        model_config: the model's config where the checkpoint carries one, as parsed JSON.
    """

    kind = "torch"

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        checkpoint = _load(path)
        self.model_config = _find_config(checkpoint)
        self._state = _find_state(checkpoint, path)
        self.tensors = {
            name: StoredTensor(
                tuple(tensor.shape),
                torch.float32 if tensor.dtype == torch.float64 else tensor.dtype,
            )
            for name, tensor in self._state.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :meth:`TensorStore.read`."""
        rows = self._state[name][start:stop].detach()
        return rows.to(self.tensors[name].dtype).contiguous()

    def close(self) -> None:
        """Drop the mapped file."""
        self._state = {}


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the legacy format warns about its own storages
            # Only the zip format can be mapped; the one before it has to be read whole.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise InputError(
                f"{path.name} contains code besides tensors, and it will not be run; save only "
                "the state dict: torch.save(model.state_dict(), ...), or give safetensors"
            ) from error
        raise InputError(f"{path.name} is not a PyTorch checkpoint, or is damaged") from error
    except Exception as error:  # a damaged file fails anywhere inside torch
        raise InputError(
            f"{path.name} is not a PyTorch checkpoint, or is damaged: {str(error)[:200]}"
        ) from error


def _find_config(checkpoint: Any) -> dict[str, Any] | None:
    if isinstance(checkpoint, Mapping):
        for key in _CONFIGS:
            value = checkpoint.get(key)
            if isinstance(value, dict) and value.keys() & _CONFIG_MARKS:
                return value
    return None


def _find_state(checkpoint: Any, path: Path) -> dict[str, torch.Tensor]:
    state = checkpoint
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path.name} holds no state dict (a mapping of names to tensors)")
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path.name}: {str(name)[:80]!r} is {type(value).__name__}, not a tensor; "
                "save only the model's state dict"
            )
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"{path.name}: {name} is not a dense tensor")
        found[name] = value
    return found
