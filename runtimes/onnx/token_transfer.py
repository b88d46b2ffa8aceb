"""Copy cached tokens, and clear memory, on the device, through ONNX Runtime.

Shapes: K key-value heads, C capacity in tokens, n tokens, H head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma3_export.device import Device
from gemma3_export.runtimes.onnx.graphs import COPY_GRAPH
from gemma3_export.runtimes.onnx.session import import_onnxruntime, open_session
from gemma3_export.runtimes.protocol import KVSegment, describe_layout

__all__ = ["HeadBuffer", "TokenTransfer", "allocate_cleared", "clear", "copier", "copy_tokens"]

ZEROS_BYTES = 2**22  # device memory that clearing copies from


@dataclass(frozen=True, slots=True)
class HeadBuffer:
    """Memory of one row of one tensor [K, C, H]: the tokens of each head are contiguous."""

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
    """Copy the first ``count`` tokens of every head, ``head_bytes`` per token."""
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
    """Return a function that copies memory on ``device``: (source, target, size in bytes)."""
    session = open_session(COPY_GRAPH, device, threads=1)

    def copy(source: int, target: int, size_bytes: int) -> None:
        binding = session.io_binding()  # one per call: threads may copy at the same time
        place = (device.kind, device.index, np.uint8, [size_bytes])
        binding.bind_input("source", *place, source)
        binding.bind_output("target", *place, target)
        session.run_with_iobinding(binding)

    return copy


def allocate_cleared(shape: Sequence[int], dtype: np.dtype[Any], device: Device) -> Any:
    """Return an OrtValue of zeros on ``device``, without a detour through host memory.

    A cache must not start with what was in memory before: kernels read whole tiles, beyond a row's
    last token, and multiply what they find there by zero, which leaves NaN where it was NaN.
    """
    value = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(
        list(shape), dtype, device.kind, device.index
    )
    clear(device, value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return value


def clear(device: Device, address: int, size_bytes: int) -> None:
    """Write zeros to memory on ``device``."""
    zeros, copy = zeros_on(device), copier(device)
    for start in range(0, size_bytes, ZEROS_BYTES):
        copy(zeros.data_ptr(), address + start, min(ZEROS_BYTES, size_bytes - start))


@functools.cache
def zeros_on(device: Device) -> Any:
    """Return an OrtValue of zero bytes on ``device``."""
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(
        np.zeros(ZEROS_BYTES, np.uint8), device.kind, device.index
    )


@dataclass(frozen=True, slots=True)
class TokenTransfer:
    """Copies tokens between an ONNX cache and segments outside of it."""

    device: Device
    dtype: np.dtype[Any]  # of the memory; uint16 for bfloat16
    dtype_name: str
    tensors: int  # two per layer
    heads: int
    head_dim: int

    @property
    def layout(self) -> str:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        shape = (self.heads, self.head_dim)
        return describe_layout(self.tensors, shape, self.dtype_name, str(self.device))

    @property
    def head_bytes(self) -> int:
        """Size of one token in one head of one tensor."""
        return self.head_dim * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """See :class:`gemma3_export.runtimes.protocol.TransferableCache`."""
        return self.tensors * self.heads * self.head_bytes

    def allocate(self, length: int) -> Any:
        """Return uninitialized memory for one tensor [1, K, ``length``, H]."""
        return import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(
            [1, self.heads, length, self.head_dim], self.dtype, self.device.kind, self.device.index
        )

    def copy_out(self, sources: Sequence[HeadBuffer], start: int, stop: int) -> KVSegment:
        """Return a copy of the tokens [``start``, ``stop``) of one row."""
        length = stop - start
        tensors = [self.allocate(length) for _ in sources]
        for source, tensor in zip(sources, tensors, strict=True):
            shifted = HeadBuffer(source.address + start * self.head_bytes, source.capacity)
            self.copy(shifted, HeadBuffer(tensor.data_ptr(), length), length)
        size_bytes = sum(tensor.tensor_size_in_bytes() for tensor in tensors)
        return KVSegment(tensors=tensors, length=length, layout=self.layout, size_bytes=size_bytes)

    def copy_in(
        self, segment: KVSegment, targets: Sequence[HeadBuffer], at: int, count: int
    ) -> None:
        """Write the first ``count`` tokens of ``segment`` into one row, from position ``at`` on."""
        for tensor, target in zip(segment.tensors, targets, strict=True):
            shifted = HeadBuffer(target.address + at * self.head_bytes, target.capacity)
            self.copy(HeadBuffer(tensor.data_ptr(), segment.length), shifted, count)

    def copy(self, source: HeadBuffer, target: HeadBuffer, count: int) -> None:
        """Copy the first ``count`` tokens of every head of one tensor."""
        copy_tokens(
            self.device, source, target, heads=self.heads, head_bytes=self.head_bytes, count=count
        )
