"""Distributed training: process group, DDP and FSDP2 wrapping, and layout-independent state.

A checkpoint holds full tensors whatever the layout, so a run can resume with another number of
processes, and the trained model is always the same folder.
"""

from __future__ import annotations

import os
import sys
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
from gemma3_export.reference.training.options import Sharding

__all__ = [
    "ProcessGroup",
    "clip_grad_norm",
    "exit_if_distributed",
    "full_model_state_dict",
    "full_optimizer_state_dict",
    "gradient_sync",
    "init_process_group",
    "load_full_state_dicts",
    "parallelize",
]

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessGroup:
    """The rank of this process, the number of processes, and the device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Return True in the process that writes files and reports progress."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Return True if there is more than one process."""
        return self.world_size > 1

    def all_reduce_mean(self, value: Tensor) -> float:
        """Return the mean of a scalar over all processes."""
        value = value.detach().double()
        if self.is_distributed:
            distributed.all_reduce(value)
            value = value / self.world_size
        return float(value)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        values = values.detach().clone()
        if self.is_distributed:
            distributed.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum of a number over all processes."""
        if not self.is_distributed:
            return value
        tensor = torch.tensor(value, device=self.device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return int(tensor)

    def barrier(self) -> None:
        """Wait for all processes to reach this point."""
        if self.is_distributed:
            distributed.barrier()


@contextmanager
def init_process_group(device: str) -> Iterator[ProcessGroup]:
    """Join the process group that torchrun's environment variables describe, and leave it after.

    Without torchrun, yield a group of one process.

    Args:
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UnavailableError: the device does not exist on this machine.
        InputError: the device name is unknown.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_device = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1:
        yield ProcessGroup(rank=0, world_size=1, device=local_device)
        return
    distributed.init_process_group("nccl" if local_device.type == "cuda" else "gloo")
    try:
        yield ProcessGroup(rank=distributed.get_rank(), world_size=world_size, device=local_device)
    finally:
        distributed.destroy_process_group()


def exit_if_distributed() -> None:
    """End a process of a distributed training at once, with exit code 0.

    Gloo's threads may still be releasing tensors of the last collective operation. That needs the
    GIL, and a thread that waits for it while the interpreter finalizes ends in an abort (seen in
    about 1 of 25 runs with torch 2.13). Everything has been written by now.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
            raise UnavailableError(f"CUDA device {index} is not available; use --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def parallelize(module: LossModule, group: ProcessGroup, sharding: Sharding) -> nn.Module:
    """Wrap ``module`` with DDP or FSDP2; return it unchanged in a single process.

    With ``fsdp`` each layer is sharded separately. The embedding, which is usually also the head,
    belongs to the root module, so it is gathered once for both uses.
    """
    if not group.is_distributed:
        return module
    if sharding == "fsdp":
        for layer in module.model.model.layers:
            fully_shard(layer)
        # The root's parameters are used from the first operation to the last: keep them gathered.
        fully_shard(module, reshard_after_forward=False)
        return module
    devices = [group.device] if group.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices)


@contextmanager
def gradient_sync(wrapped: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Enable or disable the exchange of gradients in the backward passes within the block.

    Gradient accumulation needs the exchange in the last micro-batch of a step only.
    """
    if isinstance(wrapped, DistributedDataParallel) and not enabled:
        with wrapped.no_sync():
            yield
        return
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
    yield


def clip_grad_norm(module: nn.Module, clip_norm: float) -> Tensor:
    """Clip the total gradient norm to ``clip_norm`` (0 disables); return the norm before."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip_norm or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def full_model_state_dict(module: LossModule) -> dict[str, Tensor]:
    """Return full tensors by canonical name.

    With FSDP every process must call this, and only the main process receives the tensors.
    """
    if isinstance(module, FSDPModule):
        state = get_model_state_dict(module, options=_FULL)
        tensors = cast("dict[str, Tensor]", state)
        return {name.removeprefix("model."): value for name, value in tensors.items()}
    return dict(module.model.state_dict())


def full_optimizer_state_dict(
    module: LossModule, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the optimizer state in full tensors, by weight name.

    The rules of :func:`full_model_state_dict` apply.
    """
    return dict(get_optimizer_state_dict(module, optimizer, options=_FULL))


def load_full_state_dicts(
    module: LossModule,
    optimizer: torch.optim.Optimizer | None,
    model_state: dict[str, Tensor],
    optimizer_state: dict[str, Any] | None,
) -> None:
    """Load full tensors into ``module`` and ``optimizer``, however they are sharded.

    Args:
        module: receives ``model_state``.
        optimizer: receives ``optimizer_state``; None loads the model only.
        model_state: result of :func:`full_model_state_dict`.
        optimizer_state: result of :func:`full_optimizer_state_dict`; None keeps the optimizer's.
    """
    options = StateDictOptions(full_state_dict=True)
    named: dict[str, Any] = {f"model.{name}": value for name, value in model_state.items()}
    set_model_state_dict(module, named, options=options)
    if optimizer is not None and optimizer_state is not None:
        set_optimizer_state_dict(module, optimizer, optimizer_state, options=options)
