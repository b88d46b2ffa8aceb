"""Let the C library ask for pages of 2 MB: weights that are read once a token are read faster so.

Decoding reads far more than a processor's table of 4 kB pages covers, and most systems give huge
pages only to programs that ask for them. glibc's allocator does where a variable of the environment
says so, which it looks at when a process starts; so the command line starts itself once more.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["huge_page_variables", "restart_with_huge_pages"]

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def huge_page_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to a process's environment; nothing where it is of no use.

    That is where the system gives huge pages to everybody or to nobody, where the C library is
    another one, and where somebody has set its tunables.
    """
    if TUNABLES in environment or platform.libc_ver()[0] != "glibc":
        return {}
    try:
        is_on_request = "[madvise]" in SETTING.read_text(encoding="utf-8")
    except OSError:
        return {}
    return {TUNABLES: HUGE_PAGES} if is_on_request else {}


def restart_with_huge_pages() -> None:
    """Start this process's program again with huge pages, under the same process id.

    Returns where it has them already, or there is nothing to gain.
    """
    added = huge_page_variables(os.environ)
    if added and sys.executable and len(sys.orig_argv) > 1:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | added)  # noqa: S606  (no shell)
