"""Judge the placement of a graph: what has to be on the GPU is, and nothing crosses the bus."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma3_export.bundle import Bundle
from gemma3_export.cuda.driver import LOADED_LATER
from gemma3_export.cuda.facts import PROVIDER
from gemma3_export.errors import Gemma3ExportError, UnavailableError

__all__ = [
    "COUNTERS",
    "CUDA_FIX",
    "PlacementReport",
    "check_placement",
    "cuda_environment",
]

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


# Build the stub of the CUDA libraries for the ONNX Runtime that an interpreter has.
#
# What the installed provider imports is read from its file, so that a new version of ONNX Runtime
# needs no new list.

SOURCE = Path(__file__).with_name("cuda_stub.c")
CUDA_FIX = (
    "make a virtual environment for it (`python3 -m venv .venv-cuda && "
    ".venv-cuda/bin/pip install onnxruntime-gpu`; no GPU and no CUDA are needed) and pass "
    "--cuda-python .venv-cuda/bin/python"
)
LIBRARY = re.compile(rb"lib(?:cuda|cudart|cublas|cublasLt|curand|cufft|cudnn)\.so\.\d+")
SYMBOL = re.compile(rb"\0((?:cuda|cudnn|curand|cufft|cublas|cublasLt|cu|__cuda)[A-Z][A-Za-z0-9_]+)")
# In the order of cuda_stub.c's enum.
COUNTERS = (
    "device_allocations",
    "device_bytes",
    "pinned_allocations",
    "host_to_device_copies",
    "host_to_device_bytes",
    "device_to_host_copies",
    "device_to_host_bytes",
    "device_to_device_copies",
    "device_to_device_bytes",
    "synchronizations",
    "launches",
    "library_calls",
    "graph_captures",
    "graph_launches",
    "capture_violations",
)


@contextmanager
def cuda_environment(python: Path) -> Iterator[dict[str, str]]:
    """Environment variables under which ``python`` finds an NVIDIA GPU that computes nothing.

    Args:
        python: an interpreter that has ``onnxruntime-gpu``.

    Raises:
        UnavailableError: it has not, or there is no C compiler.
    """
    library = find_provider(python)
    with tempfile.TemporaryDirectory(prefix="gemma3-export-cuda-stub-") as name:
        folder = Path(name)
        stub = compile_stub(library, folder)
        searched = [name, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        yield {
            **os.environ,
            "LD_PRELOAD": str(stub),
            "LD_LIBRARY_PATH": os.pathsep.join(searched),
        }


def find_provider(python: Path) -> Path:
    """ONNX Runtime's CUDA provider in the packages of ``python``.

    Raises:
        UnavailableError: there is none.
    """
    program = "import importlib.util as u; s = u.find_spec('onnxruntime'); print(s and s.origin)"
    try:
        done = subprocess.run(  # noqa: S603  (the interpreter that the caller chose)
            [str(python), "-P", "-c", program], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"{python} is no Python 3.11 or newer: {error}") from error
    library = Path(done.stdout.strip()).parent / "capi" / PROVIDER
    if not library.is_file():
        raise UnavailableError(f"{python} has no onnxruntime-gpu; {CUDA_FIX}")
    return library


def compile_stub(library: Path, folder: Path) -> Path:
    """Compile the stub into ``folder``, under the name of every library that it stands in for.

    Raises:
        UnavailableError: there is no C compiler.
        Gemma3ExportError: it does not compile.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnavailableError(
            "the CUDA stub needs a C compiler and there is none; on Debian and Ubuntu: "
            "apt install gcc libc6-dev"
        )
    names, symbols = imports_of(library)
    source = SOURCE.read_text(encoding="utf-8")
    defined = set(re.findall(r"\w+", source))
    rest = "".join(f"SUCCEEDS({symbol})\n" for symbol in sorted(symbols - defined))
    (folder / "cuda_stub_rest.h").write_text(rest, encoding="utf-8")
    stub = folder / "libcuda_stub.so"
    command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", f"-I{folder}"]
    done = subprocess.run(  # noqa: S603
        [*command, str(SOURCE), "-o", str(stub)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Gemma3ExportError(f"{compiler} cannot compile {SOURCE}: {done.stderr.strip()}")
    for name in names:
        (folder / name).symlink_to(stub.name)
    return stub


def imports_of(library: Path) -> tuple[set[str], set[str]]:
    """Names of the CUDA libraries that ``library`` needs, and of what it takes from them."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names = {match[0].decode() for match in LIBRARY.finditer(data)}
        symbols = {match[1].decode() for match in SYMBOL.finditer(data)}
    return names | set(LOADED_LATER), symbols
