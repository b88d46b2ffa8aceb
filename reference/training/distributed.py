"""The processes of one training: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from gemma3_export.errors import InputError, UnavailableError

__all__ = ["Ranks", "join_ranks"]


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
