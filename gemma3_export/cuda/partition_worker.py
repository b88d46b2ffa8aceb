"""Create a session for a graph and print how ONNX Runtime partitioned it, as one JSON object.

Runs over the stub in another interpreter, and needs only the standard library and onnxruntime. The
argument is the graph's file. On a machine with a GPU, :func:`partition` works in any process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile

import onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
COPY = re.compile(r"Add Memcpy(?:To|From)Host (?:before|after) (\S+)")


def create(graph: str, severity: int, **options: str) -> onnxruntime.InferenceSession:
    """Create a session on CUDA that falls back to the CPU."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = severity
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(graph, settings, providers=[(CUDA, options), CPU])


def with_log(graph: str, options: dict[str, str]) -> tuple[onnxruntime.InferenceSession, str]:
    """Create a session, and return it with what ONNX Runtime's C++ code wrote to stderr."""
    with tempfile.TemporaryFile() as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            session = create(graph, severity=1, **options)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        log.seek(0)
        return session, log.read().decode(errors="replace")


def capture_problem(graph: str, options: dict[str, str]) -> str | None:
    """Return why a CUDA graph cannot be captured, or None if it can."""
    try:
        create(graph, severity=4, **{**options, "enable_cuda_graph": "1"})
    except Exception as error:  # ONNX Runtime's errors share no base class
        return str(error).strip().split("\n", 1)[0]
    return None


def partition(graph: str, **options: str) -> dict[str, object]:
    """Return the execution provider of each node of ``graph``, given CUDA provider options."""
    session, log = with_log(graph, options)
    nodes = [
        {"provider": part.ep_name, "operator": node.op_type, "name": node.name}
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    providers = session.get_providers()
    del session
    return {
        "onnxruntime": onnxruntime.__version__,
        "providers": providers,
        "nodes": nodes,
        "copies": COPY.findall(log),
        "capture_problem": capture_problem(graph, options),
    }


if __name__ == "__main__":
    print(json.dumps(partition(sys.argv[1])))
