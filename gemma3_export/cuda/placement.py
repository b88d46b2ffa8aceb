"""Judge the placement of a graph: what has to be on the GPU is, and nothing crosses the bus."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma3_export.bundle.bundle import Bundle
from gemma3_export.cuda.stub import cuda_environment
from gemma3_export.errors import Gemma3ExportError

__all__ = ["PlacementReport", "check_placement"]

WORKER = Path(__file__).with_name("partition_worker.py")
CUDA = "CUDAExecutionProvider"
# What a few integers go through on their way to becoming an extent; no tensor of the model does.
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
# These read weights or caches, wherever they stand; a Gather of extents is told by its absence
# of copies, one of the embedding by this minimum on the GPU.
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
    """Where ONNX Runtime puts the nodes of one graph."""

    graph: str  # path within the bundle
    onnxruntime: str  # version of onnxruntime-gpu
    operators: dict[str, dict[str, int]]  # provider -> operator -> nodes
    memory_copies: tuple[str, ...]  # values that ONNX Runtime copies between CPU and GPU
    is_capturable: bool  # whether ONNX Runtime can capture the graph as a CUDA graph
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the graph runs on the GPU from end to end."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"passed": self.passed}


def check_placement(bundle: Bundle, python: Path | None = None) -> PlacementReport:
    """Ask ONNX Runtime where it would put the bundle's ONNX graph on an H100.

    Args:
        bundle: an opened bundle.
        python: an interpreter that has ``onnxruntime-gpu``; None is the running one.

    Raises:
        InputError: the bundle has no ONNX graph.
        UnavailableError: ``onnxruntime-gpu`` or a C compiler is missing.
        Gemma3ExportError: no session can be created at all.
    """
    graph = bundle.graph("onnx")
    interpreter = python or Path(sys.executable)
    with cuda_environment(interpreter) as environment:
        done = subprocess.run(  # noqa: S603  (the interpreter that the caller chose)
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
            f"ONNX Runtime created no session over the CUDA stub (exit code {done.returncode}): "
            f"{done.stderr.strip()[-2000:]}"
        ) from error
    return judge(graph.path, found)


def judge(path: str, found: Mapping[str, Any]) -> PlacementReport:
    """The report on what the worker found."""
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
    """What keeps the graph from running on the GPU from end to end."""
    if CUDA not in found["providers"]:
        yield f"the session has no {CUDA}, only {', '.join(found['providers'])}"
        return
    on_gpu = operators.get(CUDA, Counter())
    for what, kinds in NEEDED:
        if not any(on_gpu[kind] for kind in kinds):
            yield f"no {what} is on the GPU"
    for provider, counts in operators.items():
        if provider == CUDA:
            continue
        for operator, count in sorted(counts.items()):
            if operator not in SHAPE_OPERATORS:
                yield f"{count} {operator} nodes are on {provider}"
    if copies := found["copies"]:
        yield (
            f"{len(copies)} values are copied between CPU and GPU in every step, such as "
            f"{', '.join(copies[:3])}"
        )
    if found["capture_problem"] is not None:
        yield f"no CUDA graph can be captured: {found['capture_problem']}"
