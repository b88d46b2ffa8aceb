"""How many threads an export and its parity check use, in torch and in ONNX Runtime.

Both keep their threads spinning between operators. Where operators are tiny and other programs want
the processors too, handing work over takes minutes instead of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.errors import InputError

__all__ = ["SMALL_PARAMETERS", "threads_for", "torch_threads"]

SMALL_PARAMETERS = 20_000_000  # fewer than these gain nothing from a second thread


def threads_for(config: Gemma3Config, threads: int | None) -> int | None:
    """``threads``; if None, one for a small model, and None (all processors) for others.

    Raises:
        InputError: less than one.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; give at least 1")
    if threads is None and config.num_parameters < SMALL_PARAMETERS:
        return 1
    return threads


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch's operators use ``threads`` inside, and what they used before afterwards."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
