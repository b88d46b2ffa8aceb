"""The interpreter that has onnxruntime-gpu, for tests over the CUDA stub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
VARIABLE = "GEMMA3_CUDA_PYTHON"


def cuda_python() -> Path:
    """``make placement`` names it; elsewhere the test could not run, and says so."""
    if reason := problem():
        pytest.skip(f"could not run: {reason}")
    return interpreter()


def interpreter() -> Path:
    return Path(os.environ.get(VARIABLE, REPOSITORY / ".venv-cuda" / "bin" / "python"))


def problem() -> str | None:
    """Why there is none; None when there is."""
    if interpreter().is_file():
        return None
    return f"no onnxruntime-gpu at {interpreter()}; `make placement` installs it"
