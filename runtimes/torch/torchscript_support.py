"""The one place that deals with TorchScript's deprecation.

PyTorch deprecated TorchScript in 2.9 in favour of torch.export: it gets no new features, warns when
it is used, and is not supported on Python 3.14. Archives still load in current PyTorch and
libtorch; docs/torchscript.md says what that means and what comes next.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from gemma3_export.errors import UnavailableError

if TYPE_CHECKING:
    import torch

__all__ = ["executor_for", "torchscript"]

FIRST_UNSUPPORTED_PYTHON = (3, 14)


@contextmanager
def torchscript() -> Iterator[None]:
    """Run a block that uses ``torch.jit``, without the deprecation's warnings.

    Raises:
        UnavailableError: this Python has no TorchScript, or torch is not installed.
    """
    if sys.version_info >= FIRST_UNSUPPORTED_PYTHON:
        raise UnavailableError(
            "TorchScript does not support Python 3.14 and newer; use Python 3.11 to 3.13, or the "
            "ONNX runtime"
        )
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(
            'TorchScript needs torch; run: pip install "gemma3-export[export]"'
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def executor_for(device: torch.device) -> AbstractContextManager[None]:
    """The graph executor as it suits ``device``, for the steps that run inside the context.

    On a CPU its specialisation makes the first steps several times as slow and no later step
    faster: nearly all time is spent inside a few large operators. On a GPU it fuses small kernels,
    so there it stays as torch sets it.
    """
    import torch

    if device.type != "cpu":
        return nullcontext()
    optimized_execution: Callable[[bool], AbstractContextManager[None]]
    optimized_execution = torch.jit.optimized_execution  # type: ignore[attr-defined]
    return optimized_execution(False)
