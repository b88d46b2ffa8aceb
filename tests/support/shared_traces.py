"""Share traces between the tests of one process.

Tracing takes five of the six seconds that a tiny ONNX export takes on one core, and most tests
export models of the same few shapes. The trace depends on config, target, dtype and opset alone;
everything after it (passes, quantization, weights, parity) runs in every export. Exports in
processes of their own, such as those of the command line, trace for themselves.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import onnx_ir as ir

from gemma3_export.bundle import WeightRecipe
from gemma3_export.exporters.onnx import trace, writer

__all__ = ["share_traces"]

TRACES = 64  # of a few hundred kB each

traced = functools.lru_cache(TRACES)(trace.trace_onnx)


def share_traces() -> None:
    """Let all ONNX exports of this process use a copy of the first trace of its kind."""
    writer.trace_onnx = shared_trace


def shared_trace(*arguments: Any) -> tuple[ir.Model, dict[str, WeightRecipe]]:
    """Return what :func:`gemma3_export.exporters.onnx.trace.trace_onnx` does; passes change it."""
    model, recipes = traced(*arguments)
    copied = model.clone()
    # A clone would number new values from 0; with the counters of the trace, files are identical.
    copied.graph._name_authority = copy.deepcopy(model.graph._name_authority)
    return copied, dict(recipes)
