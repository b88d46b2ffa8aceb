"""Query the NVIDIA driver for its version and GPUs, through ``libcuda.so.1`` alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

from gemma3_export.cuda.facts import Driver, Gpu
from gemma3_export.device import DRIVER_LIBRARY, count_gpus

__all__ = ["read_driver"]

MAJOR, MINOR = 75, 76  # CUdevice_attribute: compute capability
NAME_BYTES = 256
Value = TypeVar("Value", bound="ctypes._SimpleCData[Any] | ctypes.Array[Any]")


def read_driver() -> Driver:
    """Describe the driver and its GPUs, as far as it answers."""
    try:
        library = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        return Driver(is_found=False, problem=str(error))
    version = cuda_version(library)
    try:
        count, error_code = count_gpus(library)
    except AttributeError as error:
        problem = f"{DRIVER_LIBRARY} is not an NVIDIA driver: {error}"
        return Driver(is_found=True, cuda_version=version, problem=problem)
    if error_code:
        return Driver(is_found=True, cuda_version=version, error_code=error_code)
    gpus = tuple(read_gpu(library, index) for index in range(count))
    return Driver(is_found=True, cuda_version=version, gpus=gpus)


def cuda_version(library: ctypes.CDLL) -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver supports, which needs no GPU."""
    number = query(lambda: library.cuDriverGetVersion, ctypes.c_int())
    return None if number is None else (number.value // 1000, number.value % 1000 // 10)


def read_gpu(library: ctypes.CDLL, index: int) -> Gpu:
    """Describe one GPU; values that the driver does not report are None."""
    device = ctypes.c_int(index)
    query(lambda: library.cuDeviceGet, device, index)
    name = ctypes.create_string_buffer(NAME_BYTES)
    named = query(lambda: library.cuDeviceGetName, name, NAME_BYTES, device)
    major = query(lambda: library.cuDeviceGetAttribute, ctypes.c_int(), MAJOR, device)
    minor = query(lambda: library.cuDeviceGetAttribute, ctypes.c_int(), MINOR, device)
    memory = query(lambda: library.cuDeviceTotalMem_v2, ctypes.c_size_t(), device)
    return Gpu(
        index=index,
        name=None if named is None else named.value.decode("utf-8", "replace"),
        compute_capability=None if major is None or minor is None else (major.value, minor.value),
        memory_bytes=None if memory is None else memory.value,
    )


def query(
    function: Callable[[], Callable[..., int]], out: Value, *arguments: object
) -> Value | None:
    """Have a driver function fill ``out``; return None if it is missing or fails."""
    try:
        failed = function()(ctypes.byref(out), *arguments)
    except AttributeError:
        return None
    return None if failed else out
