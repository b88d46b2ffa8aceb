"""The Python interpreter with onnxruntime-gpu, for tests over the CUDA stub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
VARIABLE = "GEMMA3_CUDA_PYTHON"


def cuda_python() -> Path:
    """Return the interpreter that ``make placement`` installs, or skip the test without it."""
    if reason := problem():
        pytest.skip(f"could not run: {reason}")
    return interpreter()


def interpreter() -> Path:
    return Path(os.environ.get(VARIABLE, REPOSITORY / ".venv-cuda" / "bin" / "python"))


def problem() -> str | None:
    """Return why the interpreter is missing, or None if it exists."""
    if interpreter().is_file():
        return None
    return f"no onnxruntime-gpu at {interpreter()}; `make placement` installs it"
