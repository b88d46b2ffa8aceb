"""onnxruntime-genai on a GPU, with a model from its own builder; see ``serving.py``."""

from __future__ import annotations

from pathlib import Path

import genai_worker
import onnxruntime

__all__ = ["convert", "load"]


def load(model: Path, form: str, threads: int) -> genai_worker.GenaiCandidate:
    """Load what :func:`convert` wrote; the CUDA libraries are those that pip installed."""
    onnxruntime.preload_dlls()
    return genai_worker.load(model, form, threads)


def convert(source: Path, target: Path, form: str) -> None:
    """Let the library's builder make a CUDA model."""
    genai_worker.build(source, target, form, "cuda")
