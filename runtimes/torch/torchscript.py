"""Everything that deals with TorchScript's deprecation and its graph executor.

PyTorch deprecated TorchScript in 2.9 in favor of torch.export: it gets no new features, warns when
it is used, and is not supported on Python 3.14. Archives still load in current PyTorch and
libtorch; docs/torchscript.md says what that means and what comes next.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from gemma3_export.errors import UnavailableError

__all__ = ["last_line", "torchscript", "unspecialized"]

FIRST_UNSUPPORTED_PYTHON = (3, 14)


@contextmanager
def torchscript() -> Iterator[None]:
    """Run a block that uses ``torch.jit``, without its deprecation warnings.

    Raises:
        UnavailableError: this Python has no TorchScript.
    """
    if sys.version_info >= FIRST_UNSUPPORTED_PYTHON:
        raise UnavailableError(
            "TorchScript does not support Python 3.14 and newer; use Python 3.11 to 3.13, or the "
            "ONNX runtime"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def unspecialized() -> AbstractContextManager[None]:
    """Return a context in which the graph executor runs graphs as they were exported.

    By default it records shapes in the first runs and then replaces the graph by a specialized one,
    in which it fuses elementwise operators on GPUs. These round once where the graph rounds several
    times, so logits would depend on how often, and with which shapes, an archive ran before. On a
    CPU specializing only costs time. The setting belongs to the thread and is restored at the end.
    """
    optimized_execution: Callable[[bool], AbstractContextManager[None]]
    optimized_execution = torch.jit.optimized_execution  # type: ignore[attr-defined]
    return optimized_execution(False)


def last_line(error: Exception) -> str:
    """Return the cause of a TorchScript error, which follows the stack of its own code."""
    return str(error).strip().rsplit("\n", 1)[-1]
