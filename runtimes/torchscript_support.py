"""The one place that deals with TorchScript's deprecation.

PyTorch deprecated TorchScript in 2.9 in favour of torch.export: it gets no new features, warns when
it is used, and is not supported on Python 3.14. Archives still load in current PyTorch and
libtorch; docs/torchscript.md says what that means and what comes next.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from gemma3_export.errors import UnavailableError

__all__ = ["torchscript"]

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
