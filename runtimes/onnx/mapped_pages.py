"""Return memory to the system: freed blocks, and mapped weights once they are repacked.

ONNX Runtime maps the weights file, packs most matrices into its kernels' own layout, and keeps the
mapping. The mapped pages still count as the process's memory although hardly any is read again: of
the embedding, only the rows of tokens that occur. The system may drop such pages at any time;
dropping them at once costs nothing, because pages that are needed are read from the file again.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["drop_mapped_pages", "return_freed_memory"]

MAPS = Path("/proc/self/smaps")  # Linux only
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.*)$")
CHANGED = re.compile(r"^Anonymous: +(\d+) kB$")


def drop_mapped_pages(file: Path) -> int:
    """Drop the pages of ``file`` that this process has mapped and not modified.

    Returns:
        Size of these mappings in bytes; 0 on systems without ``/proc/self/smaps``.
    """
    if sys.platform == "win32" or not MAPS.exists():
        return 0
    library, dropped = ctypes.CDLL(None, use_errno=True), 0
    smaps = MAPS.read_text(encoding="utf-8", errors="surrogateescape")
    for start, end in unchanged_mappings(smaps, file.resolve()):
        address, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        if library.madvise(address, size, mmap.MADV_DONTNEED) == 0:
            dropped += end - start
    return dropped


def return_freed_memory() -> None:
    """Return what the allocator keeps after large tensors were freed; with glibc only."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def unchanged_mappings(smaps: str, file: Path) -> Iterator[tuple[int, int]]:
    """Yield the address range of each unmodified mapping of ``file``.

    Modified pages have no copy in the file, so a mapping that contains one is skipped.
    """
    place: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if header := HEADER.match(line):
            place = (int(header[1], 16), int(header[2], 16)) if header[3] == str(file) else None
        elif place and (changed := CHANGED.match(line)):
            if changed[1] == "0":
                yield place
            place = None
