"""Run by another interpreter, over the stub: create a session and print what ONNX Runtime did.

Needs the standard library and onnxruntime alone. Arguments: the graph. Prints one JSON object.
Where there is a GPU, :func:`partition` tells the same in this process.
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
    """A session on CUDA, falling back to the CPU where it has to."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = severity
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(graph, settings, providers=[(CUDA, options), CPU])


def with_log(graph: str, options: dict[str, str]) -> tuple[onnxruntime.InferenceSession, str]:
    """A session, and what ONNX Runtime's C++ code wrote to the standard error meanwhile."""
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
    """Why a CUDA graph cannot be captured; None when it can."""
    try:
        create(graph, severity=4, **{**options, "enable_cuda_graph": "1"})
    except Exception as error:  # ONNX Runtime's errors share no base class
        return str(error).strip().split("\n", 1)[0]
    return None


def partition(graph: str, **options: str) -> dict[str, object]:
    """Where ONNX Runtime puts the nodes of ``graph``, given options of its CUDA provider."""
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
