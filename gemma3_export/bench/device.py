"""How fast a GPU reads its memory: what decoding there is held against.

    python -m gemma3_export.bench.device cuda:0

prints a JSON list of bytes per second. It runs in a process of its own, which ends before anything
is measured and takes its memory with it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

from gemma3_export.errors import UnavailableError

__all__ = ["device_bandwidths", "read_device"]

READ_BYTES = 2 * 2**30  # far beyond any cache
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
    command = [sys.executable, "-m", "gemma3_export.bench.device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UnavailableError(
            f"the memory of {device} cannot be measured with torch: {reason}; "
            f"`gemma3-export doctor --device {device} --runtime torchscript` may say why"
        )
    found: list[float] = json.loads(done.stdout)
    return found


def read_device(device: str, *, read_bytes: int = READ_BYTES, times: int = 5) -> list[float]:
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
