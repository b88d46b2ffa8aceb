"""Decode steps of torch archives whose tensors keep their shapes and never leave the device.

An archive returns its past with the new token behind it, which would be longer in every step. Here
the past is always the whole buffer, its free places masked (positions count the mask's ones, so
that shifts nothing), and the new keys and values go from the end to each row's own place. Equal
shapes spare the allocator and the graph executor work, and let a CUDA graph hold the whole step.

Shapes: B rows, K key-value heads, C capacity, H head size, V vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma3_export.runtimes.generation.candidates import Candidates, candidates_per_row
from gemma3_export.runtimes.protocol import IntArray, Logits
from gemma3_export.runtimes.torch.cache import TorchCache, as_numpy

__all__ = ["TorchDecodeSteps"]

WARM_UPS = 3  # the graph executor specialises in the first calls, which no capture may see


class TorchDecodeSteps:
    """One token for each row of one cache, again and again.

    Args:
        module: the archive's step.
        cache: its buffers never move.
        count: [1] how many logits to keep, one, where the archive wants it.
        captures: hold the step as a CUDA graph.
    """

    def __init__(self, module: Any, cache: TorchCache, count: Tensor, *, captures: bool) -> None:
        device, rows = cache.buffers[0].device, cache.batch_size
        self.module, self.buffers, self.count = module, cache.buffers, count
        # What a step takes to the device: each row's token, and how many it holds already.
        self.staged = torch.zeros((rows, 2), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.state = torch.zeros((rows, 2), dtype=torch.int64, device=device)
        self.columns = torch.arange(cache.capacity, device=device)
        self.one = torch.ones((rows, 1), dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.step: Callable[[], None] = self.compute
        self.captures = captures

    def run(self, input_ids: IntArray, cache: TorchCache) -> None:
        """Compute the logits that follow ``input_ids`` [B, 1]; they stay on the device."""
        cache.close_holes()
        state = np.concatenate((input_ids, cache.lengths[:, None]), axis=1)
        self.staged.copy_(torch.from_numpy(state))
        self.state.copy_(self.staged, non_blocking=True)
        if self.captures:
            self.step, self.captures = captured(self.compute, self.state.device), False
        self.step()
        cache.append_one_each()

    def compute(self) -> None:
        """What happens on the device; done again, it does the same."""
        capacity = len(self.columns)
        ids, lengths = self.state[:, :1], self.state[:, 1:]
        mask = torch.cat(((self.columns < lengths).long(), self.one), dim=1)
        logits, *present = self.module(ids, mask, self.buffers, self.count)
        for buffer, tensor in zip(self.buffers, present, strict=True):
            new = tensor[:, :, capacity:]  # [B, K, 1, H]
            buffer.scatter_(2, lengths[:, None, :, None].expand_as(new), new)
        self.logits = logits[:, 0]

    def candidates(self, fetched: int, needed: int) -> Sequence[Candidates | Logits]:
        """What each row's next token is chosen from: the largest logits, or all [V] of them.

        Args:
            fetched: how many logits to bring from the device.
            needed: how many of them have to be complete.
        """
        assert self.logits is not None
        values, ids = self.logits.topk(fetched)
        total = self.logits.sum(-1, keepdim=True)
        packed = torch.cat((values, ids.to(values.dtype), total), dim=-1)  # [B, 2k + 1]
        return candidates_per_row(as_numpy(packed), fetched, needed, self.fetch)

    def fetch(self) -> Logits:
        """[B, V] all logits of the last step."""
        assert self.logits is not None
        return as_numpy(self.logits)


def captured(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``compute`` as a CUDA graph: calling the result does the same to the same tensors."""
    stream: Any = torch.cuda.Stream  # untyped
    current, aside = torch.cuda.current_stream(device), stream(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            compute()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay
