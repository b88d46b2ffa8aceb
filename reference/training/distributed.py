"""The processes of one training: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.reference.training.loss import LossModule

__all__ = [
    "Ranks",
    "clip_gradients",
    "distribute",
    "join_ranks",
    "load_state",
    "synchronised_only",
    "whole_model",
    "whole_optimizer",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no peers."""
        return self.world_size == 1

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes."""
        value = value.detach().double()
        if not self.is_alone:
            distributed.all_reduce(value)
            value = value / self.world_size
        return float(value)

    def highest(self, value: int) -> int:
        """The highest of the processes' numbers: how they agree to stop together."""
        if self.is_alone:
            return value
        tensor = torch.tensor(value, device=self.device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return int(tensor)

    def wait(self) -> None:
        """Wait for all peers."""
        if not self.is_alone:
            distributed.barrier()


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """This process's place, as torchrun's environment variables tell it.

    Raises:
        UnavailableError: the device does not exist here.
        InputError: the device's name is unknown.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=place)
        return
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=distributed.get_rank(), world_size=world_size, device=place)
    finally:
        distributed.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise UnavailableError(f"there is no CUDA device {index} here; use --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


# One model on several processes: replicated (DDP) or in shards (FSDP2), and its state as one.
#
# Whatever the layout, a checkpoint holds whole tensors, so a run may go on with another number of
# processes, and the trained model is the same folder.

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def distribute(module: LossModule, ranks: Ranks, sharding: str) -> nn.Module:
    """Wrap ``module`` for its processes; alone, it stays as it is.

    With ``fsdp`` each layer is a group of its own, and the embedding, which is also the head, stays
    in the root's, so that it is gathered once for both.
    """
    if ranks.is_alone:
        return module
    if sharding == "fsdp":
        for layer in module.model.model.layers:
            fully_shard(layer)
        # The root is needed from the first operation to the last: no point in resharding it.
        fully_shard(module, reshard_after_forward=False)
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices)


@contextmanager
def synchronised_only(wrapped: nn.Module, *, last: bool) -> Iterator[None]:
    """Exchange gradients in the ``last`` micro-batch of a step only."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    yield


def clip_gradients(module: nn.Module, clip_norm: float) -> Tensor:
    """Scale gradients down to ``clip_norm`` (0: never); return their norm, as it was."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip_norm or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def whole_model(module: LossModule) -> dict[str, Tensor]:
    """Canonical name to tensor; with FSDP every process must call this, and the first gets it."""
    if isinstance(module, FSDPModule):
        state = get_model_state_dict(module, options=_WHOLE)
        tensors = cast("dict[str, Tensor]", state)
        return {name.removeprefix("model."): value for name, value in tensors.items()}
    return dict(module.model.state_dict())


def whole_optimizer(module: LossModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by name of weight, in whole tensors; calls as :func:`whole_model`."""
    return dict(get_optimizer_state_dict(module, optimizer, options=_WHOLE))


def load_state(
    module: LossModule,
    optimizer: torch.optim.Optimizer | None,
    model_state: dict[str, Tensor],
    optimizer_state: dict[str, Any] | None,
) -> None:
    """Put back what :func:`whole_model` and :func:`whole_optimizer` gave, into any layout."""
    options = StateDictOptions(full_state_dict=True)
    named: dict[str, Any] = {f"model.{name}": value for name, value in model_state.items()}
    set_model_state_dict(module, named, options=options)
    if optimizer is not None and optimizer_state is not None:
        set_optimizer_state_dict(module, optimizer, optimizer_state, options=options)
