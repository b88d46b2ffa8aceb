"""Give back the memory of weights that ONNX Runtime has laid out anew.

It maps the file of weights, packs most matrices into copies for its kernels, and keeps the mapping,
whose pages then count as the process's memory although hardly any is read again: of an embedding,
the rows of the tokens that come up. The system may drop such pages at any time; here they are
dropped at once, and what is needed comes back from the file.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["drop_mapped_pages"]

MAPS = Path("/proc/self/smaps")  # Linux has it
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.*)$")
CHANGED = re.compile(r"^Anonymous: +(\d+) kB$")


def drop_mapped_pages(file: Path) -> int:
    """Let go of the pages of ``file`` that this process has mapped and not changed.

    Returns:
        Bytes of these mappings; 0 where the system does not tell them.
    """
    if not MAPS.exists():
        return 0
    library, dropped = ctypes.CDLL(None, use_errno=True), 0
    for start, end in unchanged_mappings(MAPS.read_text(errors="surrogateescape"), file.resolve()):
        address, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        if library.madvise(address, size, mmap.MADV_DONTNEED) == 0:
            dropped += end - start
    return dropped


def unchanged_mappings(smaps: str, file: Path) -> Iterator[tuple[int, int]]:
    """First and last address of each mapping of ``file`` that equals the file.

    Pages that were written to have no copy in the file; a mapping with one of them stays.
    """
    place: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if header := HEADER.match(line):
            place = (int(header[1], 16), int(header[2], 16)) if header[3] == str(file) else None
        elif place and (changed := CHANGED.match(line)):
            if changed[1] == "0":
                yield place
            place = None
