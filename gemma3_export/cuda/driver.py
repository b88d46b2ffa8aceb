"""Ask the NVIDIA driver what there is, through ``libcuda.so.1`` and nothing else."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gemma3_export.cuda.facts import Driver, Gpu, Library
from gemma3_export.device import DRIVER_LIBRARY, count_gpus

__all__ = [
    "LOADED_LATER",
    "load_libraries",
    "needed_libraries",
    "read_driver",
    "wanted_libraries",
]

MAJOR, MINOR = 75, 76  # CUdevice_attribute: compute capability
NAME_BYTES = 256
Value = TypeVar("Value", bound="ctypes._SimpleCData[Any] | ctypes.Array[Any]")


def read_driver() -> Driver:
    """The driver's version and its GPUs, as far as it answers."""
    try:
        library = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        return Driver(is_found=False, problem=str(error))
    version = cuda_version(library)
    try:
        count, error_code = count_gpus(library)
    except AttributeError as error:
        problem = f"{DRIVER_LIBRARY} is no NVIDIA driver: {error}"
        return Driver(is_found=True, cuda_version=version, problem=problem)
    if error_code:
        return Driver(is_found=True, cuda_version=version, error_code=error_code)
    gpus = tuple(read_gpu(library, index) for index in range(count))
    return Driver(is_found=True, cuda_version=version, gpus=gpus)


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


# Which libraries ONNX Runtime's CUDA provider loads, and whether the loader finds them here.
#
# The search is the one of ``onnxruntime.preload_dlls``: the folders of pip's nvidia packages, then
# the system's loader.

# Loaded by name while the provider runs, so that its file does not name it; of what this project
# exports nothing needs it.
LOADED_LATER = ("libcudnn.so.9",)
DRIVER = "libcuda.so.1"  # the doctor asks it itself
ELF_64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB = 1, 5


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The names that a shared object asks the loader for, as ``readelf -d`` lists them.

    Raises:
        ValueError: it is no complete 64-bit ELF file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != ELF_64_LITTLE_ENDIAN:
            raise ValueError(f"{path} is no 64-bit ELF file")
        try:
            return tuple(read_needed(data))
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def read_needed(data: mmap.mmap) -> Iterator[str]:
    """The names, through the segments and the table of names."""
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    # type, flags, offset in the file, address, physical address, bytes in the file, ...
    segments = [struct.unpack_from("<IIQQQQQQ", data, start + i * size) for i in range(count)]
    (dynamic,) = [segment for segment in segments if segment[0] == PT_DYNAMIC][:1] or [(0,) * 8]
    entries = []
    for position in range(dynamic[2], dynamic[2] + dynamic[5], 16):
        tag, value = struct.unpack_from("<qQ", data, position)
        if not tag:
            break
        entries.append((tag, value))
    names = [value for tag, value in entries if tag == DT_STRTAB]
    for _, _, offset, address, _, in_file, *_ in (s for s in segments if s[0] == PT_LOAD):
        if names and address <= names[0] < address + in_file:
            table = names[0] - address + offset
            for position in (table + value for tag, value in entries if tag == DT_NEEDED):
                yield data[position : data.find(b"\0", position)].decode("ascii")


def wanted_libraries(provider: Path) -> dict[str, bool]:
    """What ``provider`` loads, and whether it needs it; the driver is another matter.

    Raises:
        ValueError: its file is damaged.
    """
    needed = dict.fromkeys(needed_libraries(provider), True)
    needed.pop(DRIVER, None)
    return needed | dict.fromkeys(LOADED_LATER, False)


def load_libraries(provider: Path, but: Collection[str] = ()) -> Iterator[Library]:
    """Load what ``provider`` wants, one after the other; see the module's docstring.

    Args:
        provider: ONNX Runtime's CUDA provider.
        but: names that are left out.

    Raises:
        ValueError: the provider's file is damaged.
    """
    folders = nvidia_folders()
    for name, is_needed in wanted_libraries(provider).items():
        if name not in but:
            yield load(name, folders, is_needed=is_needed)


def load(soname: str, folders: list[Path], *, is_needed: bool) -> Library:
    """Load one library from the first place that has it."""
    files = [folder / soname for folder in folders if (folder / soname).exists()]
    for name in (*map(str, files), soname):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            problem = str(error)
            if name != soname:  # this is the file that ONNX Runtime would take
                return Library(soname=soname, is_needed=is_needed, path=name, problem=problem)
        else:
            return Library(soname=soname, is_needed=is_needed, path=loaded_path(soname) or name)
    return Library(soname=soname, is_needed=is_needed, problem=problem)


def nvidia_folders() -> list[Path]:
    """The library folders of pip's nvidia packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return sorted(folder for place in places for folder in Path(place).glob("*/lib"))


def loaded_path(soname: str) -> str | None:
    """The file behind a library that this process has loaded, where the system tells it."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return next((path for path in sorted(paths) if Path(path).name.startswith(soname)), None)
