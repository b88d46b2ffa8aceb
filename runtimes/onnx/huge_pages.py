"""Keep weights in huge pages, so that decoding translates fewer addresses.

Decoding reads all weights once per token. A processor's address cache (TLB) covers far less memory
than that with pages of 4 kB. There are two ways to pages of 2 MB, both on Linux only:

- glibc can ask for them as it allocates, if an environment variable says so when the process starts
  (:func:`with_huge_pages`).
- The kernel can move memory that is in use (:func:`collapse_new_memory`, Linux 6.1 or newer).

Which one is faster depends on how fragmented free memory is: loading takes half to twice as long
with the first, and moving the weights 0.2 to 2 times as long as loading them. Neither changes a
number. A system without huge pages ignores both.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

__all__ = [
    "collapse_new_memory",
    "huge_page_bytes",
    "huge_page_setting",
    "private_memory",
    "with_huge_pages",
]

MAPS = Path("/proc/self/maps")
ROLLUP = Path("/proc/self/smaps_rollup")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
# Memory that belongs to no file: the heap and what allocators have mapped.
PRIVATE = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) rw.p [0-9a-f]+ 00:00 0 *(?:\[heap\]|\[anon:.*\])?$", re.MULTILINE
)
MADV_COLLAPSE = 25  # missing in the module mmap
HUGE_PAGE_BYTES = 2 * 2**20
Range = tuple[int, int]  # addresses, the end excluded


def huge_page_setting() -> str | None:
    """Return who gets huge pages: ``always``, ``madvise`` (who asks) or ``never``.

    None is a system without them.
    """
    try:
        found = re.search(r"\[(\w+)\]", SETTING.read_text(encoding="ascii"))
    except OSError:
        return None
    return found[1] if found else None


def with_huge_pages(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Return the environment of a process whose C library asks for huge pages.

    Args:
        variables: the environment otherwise.

    Returns:
        None if it would change nothing: the system has no huge pages or gives them to all, this is
        not glibc, or ``variables`` decide already.
    """
    tunables = variables.get(TUNABLES, "")
    if TUNABLE in tunables or huge_page_setting() != "madvise" or not has_glibc():
        return None
    return {**variables, TUNABLES: ":".join(filter(None, (tunables, f"{TUNABLE}=1")))}


def has_glibc() -> bool:
    """Return whether the C library is glibc; versions before 2.35 ignore the tunable."""
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, OSError, ValueError):  # another system or C library
        return False


def private_memory() -> list[Range]:
    """Return the memory of this process that belongs to no file; on Linux only."""
    if sys.platform != "linux" or not MAPS.exists():
        return []
    maps = MAPS.read_text(encoding="utf-8", errors="surrogateescape")
    return [(int(start, 16), int(end, 16)) for start, end in PRIVATE.findall(maps)]


def collapse_new_memory(before: Iterable[Range]) -> None:
    """Move the memory that this process has allocated since into huge pages.

    Memory that the kernel cannot move stays as it is. The kernel would also do it on a system whose
    setting is ``never``; we do not.

    Args:
        before: what :func:`private_memory` returned earlier.
    """
    now = private_memory()
    if not now or huge_page_setting() in (None, "never"):
        return
    library = ctypes.CDLL(None)
    for start, end in added_ranges(before, now):
        first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        size = (end - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if size > 0:
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_COLLAPSE)


def added_ranges(before: Iterable[Range], now: Iterable[Range]) -> Iterator[Range]:
    """Yield the parts of ``now`` that are not in ``before``; both are in order."""
    known = list(before)
    for start, end in now:
        for known_start, known_end in known:
            if known_end <= start or known_start >= end:
                continue
            if known_start > start:
                yield start, known_start
            start = known_end
        if start < end:
            yield start, end


def huge_page_bytes() -> int | None:
    """Return how much memory of this process is in huge pages; None if the system does not say."""
    try:
        rollup = ROLLUP.read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^AnonHugePages: +(\d+) kB$", rollup, re.MULTILINE)
    return 1024 * int(found[1]) if found else None
