"""Describe the machine that a benchmark ran on, and measure how fast it reads memory.

Decoding is bound by the memory that the weights are read from: that of the CPU, or that of a GPU.
The GPU's is measured in a separate process, which frees the GPU's memory before the benchmark:

    python -m gemma3_export.bench.machine cuda:0        prints a JSON list of bytes per second
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np

from gemma3_export.errors import UnavailableError
from gemma3_export.processor_kind import read_processor
from gemma3_export.processors import available_processors
from gemma3_export.runtimes.onnx.huge_pages import huge_page_setting

__all__ = [
    "describe_machine",
    "gpu_bandwidths",
    "measure_bandwidths",
    "measure_gpu_bandwidths",
]

READ_BYTES = 512 * 2**20  # far larger than any cache
GPU_READ_BYTES = 2 * 2**30
GPU_COLUMNS = 8192
GPU_PASSES = 20  # per synchronization with the device


def describe_machine() -> dict[str, object]:
    """Return processor, memory, system and load; nothing that identifies the machine."""
    return {
        "processor": asdict(read_processor()),
        "processors": available_processors(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "huge_pages": huge_page_setting(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def memory_bytes() -> int | None:
    """Return the size of physical memory, or None if the system does not report it."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def measure_bandwidths(threads: int, times: int = 5) -> list[float]:
    """Measure ``times`` times how many bytes per second ``threads`` threads read from memory.

    The threads reduce an array with a numpy operation that does almost no work per byte and starts
    no threads of its own. A matrix-vector product would go through BLAS and its thread pool.
    """
    block = np.ones(READ_BYTES // 8, np.int64)
    parts = np.array_split(block, threads)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(times + 1):
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            found.append(block.nbytes / (time.perf_counter() - started))
    return found[1:]  # the first pass starts the threads


def gpu_bandwidths(device: str) -> list[float]:
    """Run :func:`measure_gpu_bandwidths` for ``device`` in a separate process.

    Raises:
        UnavailableError: torch is missing or cannot use the device.
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


def measure_gpu_bandwidths(
    device: str, *, read_bytes: int = GPU_READ_BYTES, times: int = 5
) -> list[float]:
    """Time matrix-vector products, which read weights as decoding does, in bytes per second."""
    import torch

    torch_device = torch.device(device)
    matrix = torch.ones(
        read_bytes // 2 // GPU_COLUMNS, GPU_COLUMNS, dtype=torch.bfloat16, device=torch_device
    )
    vector = torch.ones(GPU_COLUMNS, dtype=torch.bfloat16, device=torch_device)
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        for _ in range(GPU_PASSES):
            product = matrix @ vector
        product[:1].cpu()  # waits for all products
        found.append(GPU_PASSES * matrix.nbytes / (time.perf_counter() - started))
    return found[1:]  # the first pass loads the kernel


if __name__ == "__main__":
    print(json.dumps(measure_gpu_bandwidths(sys.argv[1])))
