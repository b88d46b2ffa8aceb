"""Devices as every backend and the command line name them, GPU detection and GPU options."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from dataclasses import dataclass

from gemma3_export.errors import InputError
from gemma3_export.limits import MAX_SIZE_BYTES, check_integer, shown

__all__ = [
    "BOTH_INSTALLED",
    "CPU_PACKAGE",
    "CUDA_EXTRA",
    "DRIVER_LIBRARY",
    "GPU_PACKAGE",
    "REINSTALL",
    "TELEMETRY_OFF",
    "CudaOptions",
    "Device",
    "count_gpus",
    "gpu_count",
    "is_installed",
    "parse_device",
]

DRIVER_LIBRARY = "libcuda.so.1"
TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"  # environment variable of ONNX Runtime
CPU_PACKAGE, GPU_PACKAGE = "onnxruntime", "onnxruntime-gpu"
CUDA_EXTRA = 'pip install "gemma3-export[cuda]"'
REINSTALL = f"pip uninstall -y onnxruntime onnxruntime-gpu && {CUDA_EXTRA}"
BOTH_INSTALLED = "onnxruntime and onnxruntime-gpu are both installed and the former hides CUDA"


@dataclass(frozen=True, slots=True)
class Device:
    """A device that holds tensors: ``cpu``, or ``cuda`` with an index."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaOptions:
    """Options for running on an NVIDIA GPU; all but ``graph`` apply to ONNX Runtime only.

    Raises:
        InputError: ``memory_limit_bytes`` is not positive.
    """

    # Capture decode steps as a CUDA graph, one per cache; None does so if the steps allow it.
    graph: bool | None = None
    tf32: bool = False  # let float32 products round their inputs to a 10-bit mantissa
    memory_limit_bytes: int | None = None  # of the provider's arena; caches are allocated on top
    grows_exactly: bool = True  # the arena grows by what is requested, not to a power of two

    def __post_init__(self) -> None:
        if self.memory_limit_bytes is not None:
            name = "the GPU memory limit in bytes"
            check_integer(name, self.memory_limit_bytes, 1, MAX_SIZE_BYTES)


def parse_device(text: str) -> Device | None:
    """Parse ``cpu``, ``cuda`` or ``cuda:N``; return None for ``auto``.

    Raises:
        InputError: anything else.
    """
    if text == "auto":
        return None
    kind, colon, index = text.partition(":")
    if kind == "cpu" and not colon:
        return Device("cpu")
    if kind == "cuda" and (not colon or re.fullmatch(r"[0-9]{1,4}", index)):
        return Device("cuda", int(index or 0))
    raise InputError(f"unknown device {shown(text)}; choose auto, cpu, cuda or cuda:N")


def gpu_count() -> int:
    """Return the number of GPUs that the NVIDIA driver offers; 0 without a driver."""
    try:
        count, error = count_gpus(ctypes.CDLL(DRIVER_LIBRARY))
    except (OSError, AttributeError):
        return 0
    return 0 if error else count


def count_gpus(driver: ctypes.CDLL) -> tuple[int, int]:
    """Return the number of GPUs and the driver's error code (0: no error)."""
    count = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value, int(error)


def is_installed(distribution: str) -> bool:
    """Return whether pip knows ``distribution``."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
