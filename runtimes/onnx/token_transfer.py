"""Copies of cached tokens that do not leave the device: ONNX Runtime copies, on CPU and CUDA alike.

Shapes: K key-value heads, C capacity in tokens, n tokens, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma3_export.device import Device
from gemma3_export.runtimes.onnx.graphs import COPY_GRAPH
from gemma3_export.runtimes.onnx.session import import_onnxruntime, open_session
from gemma3_export.runtimes.protocol import KVSegment, describe_layout

__all__ = ["HeadBuffer", "SharesByCopies", "TokenTransfer", "copy_tokens"]


@dataclass(frozen=True, slots=True)
class HeadBuffer:
    """K runs of C tokens in a row: where one tensor of one row lies."""

    address: int
    capacity: int  # C


def copy_tokens(
    device: Device,
    source: HeadBuffer,
    target: HeadBuffer,
    *,
    heads: int,
    head_bytes: int,
    count: int,
) -> None:
    """Copy the first ``count`` tokens of every head, ``head_bytes`` each."""
    if not count:
        return
    copy = copier(device)
    for head in range(heads):
        copy(
            source.address + head * source.capacity * head_bytes,
            target.address + head * target.capacity * head_bytes,
            count * head_bytes,
        )


@functools.cache
def copier(device: Device) -> Callable[[int, int, int], None]:
    """A function of source address, target address and bytes."""
    session = open_session(COPY_GRAPH, device, threads=1)

    def copy(source: int, target: int, size_bytes: int) -> None:
        binding = session.io_binding()  # of its own: threads may copy at the same time
        place = (device.kind, device.index, np.uint8, [size_bytes])
        binding.bind_input("source", *place, source)
        binding.bind_output("target", *place, target)
        session.run_with_iobinding(binding)

    return copy


@dataclass(frozen=True, slots=True)
class TokenTransfer:
    """What the ONNX caches have in common when they give and take tokens."""

    device: Device
    dtype: np.dtype[Any]  # of the memory; integers for bfloat16
    dtype_name: str
    tensors: int  # two a layer
    heads: int
    head_dim: int

    @property
    def layout(self) -> str:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        shape = (self.heads, self.head_dim)
        return describe_layout(self.tensors, shape, self.dtype_name, str(self.device))

    @property
    def head_bytes(self) -> int:
        """Of one token in one head of one tensor."""
        return self.head_dim * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return self.tensors * self.heads * self.head_bytes

    def allocate(self, length: int) -> Any:
        """Memory for [1, K, ``length``, H]."""
        return import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(
            [1, self.heads, length, self.head_dim], self.dtype, self.device.kind, self.device.index
        )

    def take(self, sources: Sequence[HeadBuffer], start: int, stop: int) -> KVSegment:
        """The tokens [``start``, ``stop``) of one row."""
        length = stop - start
        tensors = [self.allocate(length) for _ in sources]
        for source, tensor in zip(sources, tensors, strict=True):
            moved = HeadBuffer(source.address + start * self.head_bytes, source.capacity)
            self.copy(moved, HeadBuffer(tensor.data_ptr(), length), length)
        size_bytes = sum(tensor.tensor_size_in_bytes() for tensor in tensors)
        return KVSegment(tensors=tensors, length=length, layout=self.layout, size_bytes=size_bytes)

    def give(self, stored: KVSegment, targets: Sequence[HeadBuffer], at: int, count: int) -> None:
        """Write the first ``count`` tokens at ``at`` of one row."""
        for tensor, target in zip(stored.tensors, targets, strict=True):
            moved = HeadBuffer(target.address + at * self.head_bytes, target.capacity)
            self.copy(HeadBuffer(tensor.data_ptr(), stored.length), moved, count)

    def copy(self, source: HeadBuffer, target: HeadBuffer, count: int) -> None:
        """Copy tokens of every head of one tensor."""
        copy_tokens(
            self.device, source, target, heads=self.heads, head_bytes=self.head_bytes, count=count
        )


class SharesByCopies:
    """The part of a ``TransferableCache`` that ``copies`` knows."""

    copies: TokenTransfer

    @property
    def layout(self) -> str:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return self.copies.layout

    @property
    def kv_bytes_per_token(self) -> int:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return self.copies.kv_bytes_per_token
