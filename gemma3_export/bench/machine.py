"""What a benchmark ran on: processor, memory, and how fast that memory can be read."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

__all__ = ["available_processors", "describe_machine", "read_bandwidths"]

READ_BYTES = 512 * 2**20  # far beyond any cache


def read_bandwidths(threads: int, times: int = 5) -> list[float]:
    """Bytes per second at which ``threads`` threads read memory, for each of ``times`` readings.

    By an operation of numpy that does next to nothing with what it reads, and has no threads of its
    own: products with a vector go through BLAS, whose threads would get in each other's way.
    """
    block = np.ones(READ_BYTES // 8, np.int64)
    parts = np.array_split(block, threads)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(times + 1):
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            found.append(block.nbytes / (time.perf_counter() - started))
    return found[1:]  # the first one starts the threads


def describe_machine() -> dict[str, object]:
    """What the numbers were measured on, without its name."""
    return {
        "processor": processor_name(),
        "processors": available_processors(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def processor_name() -> str:
    """The processor's model as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_processors() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, where the system tells it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
