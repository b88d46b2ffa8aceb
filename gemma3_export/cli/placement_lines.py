"""A placement report as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma3_export.cuda.placement import PlacementReport

__all__ = ["placement_lines"]


def placement_lines(report: PlacementReport) -> Iterator[str]:
    """What is where, what is copied, and the verdict."""
    yield f"{report.graph}: onnxruntime-gpu {report.onnxruntime} over a stub of CUDA (an H100)"
    for provider, counts in report.operators.items():
        listed = ", ".join(f"{operator} {count}" for operator, count in counts.items())
        yield f"  {provider}: {sum(counts.values())} nodes: {listed}"
    yield f"  copies between CPU and GPU in every step: {len(report.memory_copies)}"
    yield f"  CUDA graph: {'can be captured' if report.is_capturable else 'cannot be captured'}"
    for problem in report.problems:
        yield f"  problem: {problem}"
    yield f"placement: {'passed' if report.passed else 'FAILED'}"
