"""Device names as every backend and the command line spell them, and whether there is a GPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
from dataclasses import dataclass

from gemma3_export.errors import InputError

__all__ = [
    "BOTH_INSTALLED",
    "CPU_PACKAGE",
    "CUDA_EXTRA",
    "DRIVER_LIBRARY",
    "GPU_PACKAGE",
    "REINSTALL",
    "Device",
    "count_gpus",
    "gpu_count",
    "is_installed",
    "parse_device",
]

DRIVER_LIBRARY = "libcuda.so.1"
CPU_PACKAGE, GPU_PACKAGE = "onnxruntime", "onnxruntime-gpu"
CUDA_EXTRA = 'pip install "gemma3-export[cuda]"'
REINSTALL = f"pip uninstall -y onnxruntime onnxruntime-gpu && {CUDA_EXTRA}"
BOTH_INSTALLED = "onnxruntime and onnxruntime-gpu are both installed and the former hides CUDA"


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live: ``cpu``, or ``cuda`` with an index."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def parse_device(text: str) -> Device | None:
    """``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is None.

    Raises:
        InputError: anything else.
    """
    if text == "auto":
        return None
    kind, colon, index = text.partition(":")
    if kind == "cpu" and not colon:
        return Device("cpu")
    if kind == "cuda" and (not colon or (index.isascii() and index.isdigit())):
        return Device("cuda", int(index or 0))
    raise InputError(f"unknown device {text!r}; choose auto, cpu, cuda or cuda:N")


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
