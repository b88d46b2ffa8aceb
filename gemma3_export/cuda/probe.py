"""Probe one part of a CUDA installation and print JSON; a separate process, since it may crash.

:mod:`gemma3_export.cuda.doctor` starts it. The arguments name the probe (``driver``, ``libraries``,
``onnxruntime`` or ``torch``) and, except for the driver, the provider's file or the device. Prints
one object per line, as soon as it is known.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma3_export.cuda.driver import read_driver
from gemma3_export.cuda.facts import Driver, Library, Trial
from gemma3_export.cuda.libraries import load_libraries
from gemma3_export.errors import Gemma3ExportError

__all__: list[str] = []

# Integers whose product is exact in every precision
LEFT, RIGHT, PRODUCT = [[1, 2], [3, 4]], [[5, 6], [7, 8]], [[19, 22], [43, 50]]


def probe_driver() -> Iterator[Driver]:
    """Yield the driver."""
    yield read_driver()


def probe_libraries(provider: str, *crashing: str) -> Iterator[Library]:
    """Yield the provider's libraries, except those that are known to crash."""
    yield from load_libraries(Path(provider), crashing)


def try_onnxruntime(device: str) -> Iterator[Trial]:
    """Multiply two matrices on ``device`` with ONNX Runtime."""
    from gemma3_export.runtimes.onnx.graphs import PRODUCT_GRAPH
    from gemma3_export.runtimes.onnx.session import choose_device, import_onnxruntime, open_session

    try:
        ort = import_onnxruntime()
    except Exception as error:  # importing damaged files can raise anything
        yield Trial(framework="onnxruntime", problem=cause_of(error))
        return
    facts: dict[str, Any] = {"framework": f"onnxruntime {getattr(ort, '__version__', '?')}"}
    try:
        import numpy as np

        facts["providers"] = tuple(ort.get_available_providers())
        session = open_session(PRODUCT_GRAPH, choose_device(device))
        left, right = (np.array(matrix, np.float32) for matrix in (LEFT, RIGHT))
        (product,) = session.run(None, {"left": left, "right": right})
        facts["is_right"] = product.tolist() == PRODUCT
    except Exception as error:  # ONNX Runtime's errors share no base class
        facts["problem"] = cause_of(error)
    yield Trial(**facts)


def try_torch(device: str) -> Iterator[Trial]:
    """Multiply two matrices with torch on ``device``."""
    try:
        import torch
    except Exception as error:  # importing damaged files can raise anything
        yield Trial(framework="torch", problem=cause_of(error))
        return
    facts: dict[str, Any] = {"framework": f"torch {torch.__version__}"}
    try:
        facts["providers"] = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
        left, right = (torch.tensor(matrix, device=device).float() for matrix in (LEFT, RIGHT))
        facts["is_right"] = (left @ right).tolist() == PRODUCT
    except Exception as error:  # torch without CUDA raises AssertionError
        facts["problem"] = cause_of(error)
    yield Trial(**facts)


def cause_of(error: BaseException) -> str:
    """Return the first line of the root cause's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, Gemma3ExportError):
        return str(error).partition("; ")[0]  # the rest refers to the doctor
    return f"{type(error).__name__}: {error}".strip().split("\n", 1)[0]


PROBES: dict[str, Callable[..., Iterator[Driver | Library | Trial]]] = {
    "driver": probe_driver,
    "libraries": probe_libraries,
    "onnxruntime": try_onnxruntime,
    "torch": try_torch,
}


def main(name: str, *arguments: str) -> None:
    """Print answers to the original stdout, and everything that libraries print to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for answer in PROBES[name](*arguments):
            answers.write(json.dumps(asdict(answer)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
