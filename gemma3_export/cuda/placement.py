"""Check that a graph computes on the GPU alone and copies nothing between CPU and GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma3_export.bundle import Bundle
from gemma3_export.cuda.stub import cuda_environment
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.files import to_path

__all__ = ["PlacementReport", "check_placement", "judge"]

WORKER = Path(__file__).with_name("partition_worker.py")
CUDA = "CUDAExecutionProvider"
# Operators that compute shapes from a few integers. They may run on the CPU.
SHAPE_OPERATORS = {
    "Add",
    "Cast",
    "Concat",
    "Gather",
    "Mul",
    "Neg",
    "Range",
    "Reshape",
    "Shape",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
}
# Operators that read weights or caches. Each kind must occur on the GPU. A Gather may belong to a
# shape or to the embedding: the copies that would be counted show that the latter is on the GPU.
NEEDED = (
    ("attention", {"Attention", "GroupQueryAttention", "MultiHeadAttention"}),
    ("matrix product", {"MatMul", "Gemm", "MatMulNBits", "FusedMatMul", "GemmFastGelu"}),
    (
        "norm",
        {
            "RMSNormalization",
            "SimplifiedLayerNormalization",
            "SkipSimplifiedLayerNormalization",
        },
    ),
    ("embedding", {"Gather", "GatherBlockQuantized"}),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementReport:
    """The execution provider of each node of one graph, and what keeps it from running on a GPU."""

    graph: str  # path in the bundle
    onnxruntime: str  # version of onnxruntime-gpu
    operators: dict[str, dict[str, int]]  # provider -> operator -> nodes
    memory_copies: tuple[str, ...]  # values that each step copies between CPU and GPU
    is_capturable: bool  # ONNX Runtime can capture it as a CUDA graph
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Return whether the graph runs on the GPU from end to end."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return asdict(self) | {"passed": self.passed}


def check_placement(bundle: Bundle, python: Path | str | None = None) -> PlacementReport:
    """Partition the bundle's ONNX graph for an H100 with ONNX Runtime, over the stub of CUDA.

    Args:
        bundle: an opened bundle.
        python: an interpreter with ``onnxruntime-gpu``; None is this one.

    Raises:
        InputError: the bundle has no ONNX graph.
        UnavailableError: ``onnxruntime-gpu`` or a C compiler is missing.
        Gemma3ExportError: ONNX Runtime cannot create a session.
    """
    graph = bundle.graph("onnx")
    interpreter = to_path(python or sys.executable, "the interpreter")
    with cuda_environment(interpreter) as environment:
        done = subprocess.run(  # noqa: S603  (the caller chose the interpreter)
            [str(interpreter), "-P", str(WORKER), str(bundle.file(graph.path))],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        found = json.loads(done.stdout)
    except ValueError as error:
        raise Gemma3ExportError(
            f"ONNX Runtime cannot create a session over the CUDA stub (exit code "
            f"{done.returncode}): {done.stderr.strip()[-2000:]}; "
            "try another version of onnxruntime-gpu"
        ) from error
    return judge(graph.path, found)


def judge(path: str, found: Mapping[str, Any]) -> PlacementReport:
    """Judge what :mod:`gemma3_export.cuda.partition_worker` found."""
    operators: dict[str, Counter[str]] = {}
    for node in found["nodes"]:
        operators.setdefault(node["provider"], Counter())[node["operator"]] += 1
    return PlacementReport(
        graph=path,
        onnxruntime=found["onnxruntime"],
        operators={name: dict(sorted(counts.items())) for name, counts in operators.items()},
        memory_copies=tuple(found["copies"]),
        is_capturable=found["capture_problem"] is None,
        problems=tuple(problems_of(found, operators)),
    )


def problems_of(found: Mapping[str, Any], operators: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Yield what keeps the graph from running on the GPU from end to end."""
    if CUDA not in found["providers"]:
        yield f"the session does not use {CUDA}, only {', '.join(found['providers'])}"
        return
    on_gpu = operators.get(CUDA, Counter())
    for name, kinds in NEEDED:
        if not any(on_gpu[kind] for kind in kinds):
            yield f"no {name} is on the GPU"
    for provider, counts in operators.items():
        if provider == CUDA:
            continue
        for operator, count in sorted(counts.items()):
            if operator not in SHAPE_OPERATORS:
                yield f"{count} {operator} nodes are on {provider}"
    if copies := found["copies"]:
        yield (
            f"{len(copies)} values are copied between CPU and GPU in each step, such as "
            f"{', '.join(copies[:3])}"
        )
    if found["capture_problem"] is not None:
        yield f"the graph cannot be captured as a CUDA graph: {found['capture_problem']}"
