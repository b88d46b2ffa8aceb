"""Ask the NVIDIA driver what there is, through ``libcuda.so.1`` and nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

from gemma3_export.cuda.facts import Driver, Gpu

__all__ = ["gpu_count", "read_driver"]

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CUdevice_attribute: compute capability
NAME_BYTES = 256
Value = TypeVar("Value", bound="ctypes._SimpleCData[Any] | ctypes.Array[Any]")


def gpu_count() -> int:
    """GPUs that the NVIDIA driver offers; 0 without a driver."""
    try:
        count, error = count_devices(ctypes.CDLL(LIBRARY))
    except (OSError, AttributeError):
        return 0
    return 0 if error else count


def read_driver() -> Driver:
    """The driver's version and its GPUs, as far as it answers."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return Driver(is_found=False, problem=str(error))
    version = cuda_version(library)
    try:
        count, error_code = count_devices(library)
    except AttributeError as error:
        problem = f"{LIBRARY} is no NVIDIA driver: {error}"
        return Driver(is_found=True, cuda_version=version, problem=problem)
    if error_code:
        return Driver(is_found=True, cuda_version=version, error_code=error_code)
    gpus = tuple(read_gpu(library, index) for index in range(count))
    return Driver(is_found=True, cuda_version=version, gpus=gpus)


def count_devices(library: ctypes.CDLL) -> tuple[int, int]:
    """Number of GPUs, and the driver's error code, which is 0 when there was none."""
    count = ctypes.c_int(0)
    error = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    return count.value, int(error)


def cuda_version(library: ctypes.CDLL) -> tuple[int, int] | None:
    """The newest CUDA that the driver supports; it answers without a GPU too."""
    number = asked(lambda: library.cuDriverGetVersion, ctypes.c_int())
    return None if number is None else (number.value // 1000, number.value % 1000 // 10)


def read_gpu(library: ctypes.CDLL, index: int) -> Gpu:
    """One GPU; what the driver does not answer is None."""
    device = ctypes.c_int(index)
    asked(lambda: library.cuDeviceGet, device, index)
    name = ctypes.create_string_buffer(NAME_BYTES)
    named = asked(lambda: library.cuDeviceGetName, name, NAME_BYTES, device)
    major = asked(lambda: library.cuDeviceGetAttribute, ctypes.c_int(), MAJOR, device)
    minor = asked(lambda: library.cuDeviceGetAttribute, ctypes.c_int(), MINOR, device)
    memory = asked(lambda: library.cuDeviceTotalMem_v2, ctypes.c_size_t(), device)
    return Gpu(
        index=index,
        name=None if named is None else named.value.decode("utf-8", "replace"),
        compute_capability=None if major is None or minor is None else (major.value, minor.value),
        memory_bytes=None if memory is None else memory.value,
    )


def asked(
    function: Callable[[], Callable[..., int]], out: Value, *arguments: object
) -> Value | None:
    """``out`` as a function of the driver filled it; None where it has none or fails."""
    try:
        failed = function()(ctypes.byref(out), *arguments)
    except AttributeError:
        return None
    return None if failed else out
