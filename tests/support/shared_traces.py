"""Share traces between all tests of a run, whatever process they run in.

Tracing takes five of the six seconds that a tiny ONNX export takes on one core, and most tests
export models of the same few shapes. The trace depends on config, target, dtype and opset alone,
and on the code; everything after it (passes, quantization, weights, parity) runs in every export.
A trace is kept in the folder of the test run, so no run sees one of older code, and a test that
replaces a part of the model or of the exporter traces for itself. So do exports in processes that
do not call :func:`share_traces`.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from gemma3_export.bundle import WeightRecipe
from gemma3_export.exporters.onnx import trace, writer
from tests.support.exported_bundles import made_once

__all__ = ["is_patched", "share_traces"]

PACKAGE = "gemma3_export."
# Nodes of a graph form a list whose links pickle follows one by one.
RECURSION_LIMIT = 100_000


def share_traces() -> None:
    """Let all ONNX exports of this process use a copy of the first trace of its kind."""
    original_definitions()
    writer.trace_onnx = shared_trace


def shared_trace(*arguments: Any) -> tuple[ir.Model, dict[str, WeightRecipe]]:
    """Return what :func:`gemma3_export.exporters.onnx.trace.trace_onnx` does; passes change it."""
    if is_patched():
        return trace.trace_onnx(*arguments)
    digest = hashlib.sha256(repr(arguments).encode()).hexdigest()[:16]
    try:
        file = made_once(f"traces/{digest}", lambda path: write_trace(path, *arguments))
    except OSError:  # a test limits the size of this process's files
        return trace.trace_onnx(*arguments)
    model, recipes = pickle.loads(file.read_bytes())
    return cloned(model), recipes


def write_trace(path: Path, *arguments: Any) -> None:
    """Trace, and write the trace to ``path`` at once."""
    model, recipes = trace.trace_onnx(*arguments)
    model = cloned(model)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            name, array = value.const_value.name, value.const_value.numpy()
            value.const_value = ir.Tensor(array, name=name)
    forget_torch(model.graph)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION_LIMIT)
    try:
        data = pickle.dumps((model, recipes))
    finally:
        sys.setrecursionlimit(limit)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def cloned(model: ir.Model) -> ir.Model:
    """Return a model without torch's objects, and whose nodes are found by their new addresses."""
    clone = model.clone()
    # A clone would number new values from 0; with the counters of the trace, files are identical.
    clone.graph._name_authority = model.graph._name_authority
    return clone


def forget_torch(graph: ir.Graph) -> None:
    """Drop references to nodes of torch's own graph, which no pass reads and pickle rejects."""
    for node in graph:
        for owner in (node, *node.outputs):
            owner.meta.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.meta.clear()


def is_patched() -> bool:
    """Return whether a test has replaced something that a trace is made with."""
    now = definitions()
    return any(now.get(name) is not value for name, value in original_definitions().items())


@cache
def original_definitions() -> dict[tuple[str, ...], object]:
    """Return the definitions as they were when the test run began."""
    return definitions()


def definitions() -> dict[tuple[str, ...], object]:
    """Return what the modules of a trace define or import, and what their classes define."""
    found: dict[tuple[str, ...], object] = {}
    for module in modules_of_a_trace():
        for name, value in vars(module).items():
            if not name.startswith("__"):
                found[module.__name__, name] = value
                if isinstance(value, type) and value.__module__ == module.__name__:
                    found |= {(module.__name__, name, key): of for key, of in vars(value).items()}
    return found


@cache
def modules_of_a_trace() -> tuple[ModuleType, ...]:
    """Return the module that traces, and the modules of this package that it imports."""
    found = {trace.__name__: trace}
    pending: list[ModuleType] = [trace]
    while pending:
        for value in vars(pending.pop()).values():
            name = value.__name__ if isinstance(value, ModuleType) else value_module(value)
            if name.startswith(PACKAGE) and name in sys.modules and name not in found:
                found[name] = sys.modules[name]
                pending.append(sys.modules[name])
    return tuple(found.values())


def value_module(value: object) -> str:
    """Return the name of the module that defines a function or class, or an empty string."""
    name = getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""
