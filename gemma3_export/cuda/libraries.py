"""Find the libraries that ONNX Runtime's CUDA provider loads, and try to load them.

The search order is that of ``onnxruntime.preload_dlls``: the folders of pip's nvidia packages, then
the system's loader.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from gemma3_export.cuda.facts import Library
from gemma3_export.device import DRIVER_LIBRARY

__all__ = [
    "LOADED_LATER",
    "load_libraries",
    "needed_libraries",
    "wanted_libraries",
]

# The running provider loads it by name, so the provider's file does not list it. No graph that this
# project exports needs it.
LOADED_LATER = ("libcudnn.so.9",)
ELF_64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB = 1, 5


def needed_libraries(path: Path) -> tuple[str, ...]:
    """Return the libraries that a shared object links to, as ``readelf -d`` lists them.

    Raises:
        ValueError: the file is not a complete 64-bit ELF file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != ELF_64_LITTLE_ENDIAN:
            raise ValueError(f"{path} is not a 64-bit ELF file")
        try:
            return tuple(read_needed(data))
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def read_needed(data: mmap.mmap) -> Iterator[str]:
    """Yield the names in the dynamic section, which the string table contains."""
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
    """Return the libraries that ``provider`` loads, except the driver, and whether it needs each.

    Raises:
        ValueError: the provider's file is damaged.
    """
    needed = dict.fromkeys(needed_libraries(provider), True)
    needed.pop(DRIVER_LIBRARY, None)
    return needed | dict.fromkeys(LOADED_LATER, False)


def load_libraries(provider: Path, excluded: Collection[str] = ()) -> Iterator[Library]:
    """Load the libraries of ``provider`` one after the other, and yield what happened.

    Args:
        provider: ONNX Runtime's CUDA provider.
        excluded: names of libraries not to load.

    Raises:
        ValueError: the provider's file is damaged.
    """
    folders = nvidia_folders()
    for name, is_needed in wanted_libraries(provider).items():
        if name not in excluded:
            yield load(name, folders, is_needed=is_needed)


def load(soname: str, folders: list[Path], *, is_needed: bool) -> Library:
    """Load one library from the first folder that contains it."""
    files = [folder / soname for folder in folders if (folder / soname).exists()]
    for name in (*map(str, files), soname):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            problem = str(error)
            if name != soname:  # ONNX Runtime would load this file
                return Library(soname=soname, is_needed=is_needed, path=name, problem=problem)
        else:
            return Library(soname=soname, is_needed=is_needed, path=loaded_path(soname) or name)
    return Library(soname=soname, is_needed=is_needed, problem=problem)


def nvidia_folders() -> list[Path]:
    """Return the library folders of pip's nvidia packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return sorted(folder for place in places for folder in Path(place).glob("*/lib"))


def loaded_path(soname: str) -> str | None:
    """Return the file of a library that this process has loaded, or None if it is unknown."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return next((path for path in sorted(paths) if Path(path).name.startswith(soname)), None)
