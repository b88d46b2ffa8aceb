"""The interpreter that has onnxruntime-gpu, for tests over the CUDA stub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
VARIABLE = "GEMMA3_CUDA_PYTHON"


def cuda_python() -> Path:
    """``make placement`` names it; elsewhere the test could not run, and says so."""
    python = Path(os.environ.get(VARIABLE, REPOSITORY / ".venv-cuda" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"could not run: no onnxruntime-gpu at {python}; `make placement` installs it")
    return python
