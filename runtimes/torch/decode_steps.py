"""Single-token decode steps of torch archives over preallocated device buffers.

An archive returns its past with the new token appended, so shapes would grow with every step. Here
the past is always the whole buffer with unused positions masked; positions count the ones of the
mask, so this shifts nothing. The new keys and values are then moved from the end to each row's next
position. Constant shapes save work in the allocator and the graph executor, and let a CUDA graph
capture the whole step.

Shapes: B rows of the cache, R rows of a step, K key-value heads, C capacity, H head size, V
vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma3_export.runtimes.generation.candidates import Candidates, candidates_per_row
from gemma3_export.runtimes.protocol import IntArray, Logits, check_capacity
from gemma3_export.runtimes.torch.cache import TorchCache
from gemma3_export.runtimes.torch.tensors import as_numpy

__all__ = ["TorchDecodeSteps"]

WARM_UPS = 3  # libraries allocate and load kernels in first calls, which must not be captured


class TorchDecodeSteps:
    """Decode steps of one cache. They compute every row, at a position that it does not hold yet.

    Args:
        module: the archive's step function.
        cache: the cache, whose buffers never move.
        count: [1] the number of logits to keep, which is one, on the device the archive expects.
        captures: capture the step as a CUDA graph.
    """

    def __init__(self, module: Any, cache: TorchCache, count: Tensor, *, captures: bool) -> None:
        device, rows = cache.buffers[0].device, cache.batch_size
        self.module, self.buffers, self.count = module, cache.buffers, count
        # What a step copies to the device: each row's token, and how many tokens it holds.
        self.staged = torch.zeros((rows, 2), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.state = torch.zeros((rows, 2), dtype=torch.int64, device=device)
        self.columns = torch.arange(cache.capacity, device=device)
        self.one = torch.ones((rows, 1), dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.active = range(rows)  # rows that took part in the last step
        self.step: Callable[[], None] = self.compute
        self.captures = captures

    def run(self, input_ids: IntArray, cache: TorchCache, rows: range) -> None:
        """Compute the logits that follow ``input_ids`` [R, 1]; they stay on the device."""
        check_capacity(cache, 1, 0, cache.batch_size)
        cache.close_gaps()
        state = np.zeros((cache.batch_size, 2), np.int64)
        state[rows.start : rows.stop, :1] = input_ids
        state[:, 1] = cache.lengths
        self.staged.copy_(torch.from_numpy(state))
        self.state.copy_(self.staged, non_blocking=True)
        if self.captures:
            self.step, self.captures = captured(self.compute, self.state.device), False
        self.step()
        cache.append_one_each(rows)
        self.active = rows

    def compute(self) -> None:
        """Run the part of a step that is on the device; it is idempotent."""
        capacity = len(self.columns)
        ids, lengths = self.state[:, :1], self.state[:, 1:]
        mask = torch.cat(((self.columns < lengths).long(), self.one), dim=1)
        logits, *present = self.module(ids, mask, self.buffers, self.count)
        for buffer, tensor in zip(self.buffers, present, strict=True):
            new = tensor[:, :, capacity:]  # [B, K, 1, H]
            buffer.scatter_(2, lengths[:, None, :, None].expand_as(new), new)
        self.logits = logits[:, 0]

    def candidates(self, fetched: int, needed: int) -> Sequence[Candidates | Logits]:
        """Return what decides each row's next token: the largest logits, or all [V] of them.

        Args:
            fetched: how many logits to fetch from the device.
            needed: how many of them have to be complete.
        """
        assert self.logits is not None
        values, ids = self.logits.topk(fetched)
        total = self.logits.sum(-1, keepdim=True)
        packed = as_numpy(torch.cat((values, ids.to(values.dtype), total), dim=-1))  # [B, 2k + 1]
        taking_part = packed[self.active.start : self.active.stop]
        return candidates_per_row(taking_part, fetched, needed, self.fetch)

    def fetch(self) -> Logits:
        """Return all logits [R, V] of the last step."""
        assert self.logits is not None
        return as_numpy(self.logits[self.active.start : self.active.stop])


def captured(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``compute`` as a CUDA graph; return what replays it on the same tensors."""
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
