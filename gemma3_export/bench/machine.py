"""What a benchmark ran on: processor, memory, and how fast that memory can be read."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gemma3_export.errors import UnavailableError

__all__ = [
    "available_processors",
    "describe_machine",
    "device_bandwidths",
    "read_bandwidths",
    "read_device",
]

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


# How fast a GPU reads its memory: what decoding there is held against.
#
#     python -m gemma3_export.bench.machine cuda:0
#
# prints a JSON list of bytes per second. It runs in a process of its own, which ends before
# anything
# is measured and takes its memory with it.

DEVICE_READ_BYTES = 2 * 2**30  # far beyond any cache
COLUMNS = 8192
PASSES = 20  # between two waits for the device


def device_bandwidths(device: str) -> list[float]:
    """Bytes per second at which ``device`` reads its memory, for each of several readings.

    Raises:
        UnavailableError: torch is missing or does not reach the device.
    """
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError(
            "measuring a GPU's memory needs torch with CUDA; run: "
            'pip install "gemma3-export[cuda,export]"'
        )
    command = [sys.executable, "-m", "gemma3_export.bench.machine", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UnavailableError(
            f"the memory of {device} cannot be measured with torch: {reason}; "
            f"`gemma3-export doctor --device {device} --runtime torchscript` may say why"
        )
    found: list[float] = json.loads(done.stdout)
    return found


def read_device(device: str, *, read_bytes: int = DEVICE_READ_BYTES, times: int = 5) -> list[float]:
    """Time products of a matrix with a vector: what decoding does with its weights."""
    import torch

    place = torch.device(device)
    matrix = torch.ones(read_bytes // 2 // COLUMNS, COLUMNS, dtype=torch.bfloat16, device=place)
    vector = torch.ones(COLUMNS, dtype=torch.bfloat16, device=place)
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        for _ in range(PASSES):
            product = matrix @ vector
        product[:1].cpu()  # waits for all of them
        found.append(PASSES * matrix.nbytes / (time.perf_counter() - started))
    return found[1:]  # the first one loads the kernel


if __name__ == "__main__":
    print(json.dumps(read_device(sys.argv[1])))
