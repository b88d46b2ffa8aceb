"""Check whether this machine can run tests marked ``cuda`` and the benchmark on a GPU.

    python -m tests.support.cuda_machine

prints the reason and exits with 3 if it cannot.
"""

from __future__ import annotations

import sys

from gemma3_export.device import gpu_count
from gemma3_export.errors import UnavailableError
from gemma3_export.runtimes.onnx.session import choose_device

__all__ = ["COULD_NOT_RUN", "problem", "without_gpu"]

COULD_NOT_RUN = UnavailableError.exit_code


def without_gpu() -> str | None:
    """Return the problem if there is no GPU with a driver; needs nothing installed."""
    if gpu_count():
        return None
    return (
        "the NVIDIA driver (libcuda.so.1) is missing or sees no GPU; install an NVIDIA driver "
        "(nvidia-smi shows it)"
    )


def problem() -> str | None:
    """Return what the machine or this environment lacks, or None if the tests can run."""
    from gemma3_export.runtimes.torch.tensors import torch_device

    if reason := without_gpu():
        return reason
    try:
        choose_device("cuda")
        torch_device("cuda")
    except UnavailableError as error:
        return str(error)
    return None


if __name__ == "__main__":
    if reason := without_gpu():
        print(f"could not run: {reason}", file=sys.stderr)
        sys.exit(COULD_NOT_RUN)
