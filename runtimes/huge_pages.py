"""Move packed weights into pages of 2 MB, which decoding reads a tenth faster than those of 4 kB.

Decoding reads all weights once a token, far more than the processor's table of 4 kB pages covers.
Most systems give huge pages only to programs that ask for them, which ONNX Runtime's allocator does
not. Linux (6.1 or newer) can gather pages that are in use; nothing but their place changes. That
takes a second or two for a gigabyte, so it happens beside the first steps.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["anonymous_mappings", "gather_in_background", "gather_pages"]

MAPS = Path("/proc/self/maps")  # Linux has it
MADV_COLLAPSE = 25
HUGE = 2 * 2**20
PIECE = 16 * HUGE  # at once: the process's memory map is locked meanwhile
WORTHWHILE_BYTES = 64 * 2**20  # of weights; caches hold what is much smaller

Mapping = tuple[int, int]  # first address, and the one after the last


def anonymous_mappings(maps: str | None = None) -> set[Mapping]:
    """Writable memory of this process that no file stands behind, in mappings of 2 MB and more.

    Args:
        maps: text in the form of ``/proc/self/maps``, instead of that.
    """
    if maps is None:
        if not MAPS.exists():
            return set()
        maps = MAPS.read_text(errors="surrogateescape")
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if fields[1].startswith("rw") and fields[4] == "0" and fields[5:] in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            if end - start >= HUGE:
                found.add((start, end))
    return found


def gather_in_background(before: set[Mapping], size_bytes: int) -> threading.Thread | None:
    """Gather what was allocated since, in a thread that ends by itself.

    Args:
        before: :func:`anonymous_mappings` before the weights were loaded.
        size_bytes: of the weights; nothing happens where they are small.
    """
    if size_bytes < WORTHWHILE_BYTES:
        return None
    mappings = anonymous_mappings() - before
    thread = threading.Thread(target=gather_pages, args=(mappings,), daemon=True)
    thread.start()
    return thread


def gather_pages(mappings: set[Mapping]) -> int:
    """Ask for huge pages wherever ``mappings`` hold data; the bytes of pieces where it worked.

    A mapping may be gone by now, or hold nothing yet, or the system may have no huge pages left:
    then its pages stay as they are.
    """
    library, gathered = ctypes.CDLL(None, use_errno=True), 0
    for start, end in pieces(mappings):
        address, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        if library.madvise(address, size, MADV_COLLAPSE) == 0:
            gathered += end - start
    return gathered


def pieces(mappings: set[Mapping]) -> Iterator[Mapping]:
    """Parts of mappings that huge pages can cover."""
    for start, end in sorted(mappings):
        first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        for piece in range(first, last, PIECE):
            yield piece, min(piece + PIECE, last)
