"""Run onnxruntime-genai on a GPU, with a model from its own builder."""

from __future__ import annotations

from pathlib import Path

import genai_worker
import onnxruntime

__all__ = ["convert", "load"]


def load(model: Path, weight_format: str, threads: int) -> genai_worker.GenaiCandidate:
    """Load what :func:`convert` wrote, with the CUDA libraries that pip installed."""
    onnxruntime.preload_dlls()
    return genai_worker.load(model, weight_format, threads)


def convert(source: Path, target: Path, weight_format: str) -> None:
    """Build a CUDA model with the library's builder."""
    genai_worker.build(source, target, weight_format, "cuda")
