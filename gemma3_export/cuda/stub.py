"""Build a stub of the CUDA libraries for an interpreter's ONNX Runtime.

With the stub preloaded, ONNX Runtime finds an NVIDIA GPU that computes nothing. The list of symbols
to define is read from the installed CUDA provider, so it follows new versions of ONNX Runtime.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma3_export.cuda.facts import PROVIDER
from gemma3_export.cuda.libraries import LOADED_LATER
from gemma3_export.device import TELEMETRY_OFF
from gemma3_export.errors import Gemma3ExportError, UnavailableError

__all__ = ["COUNTERS", "CUDA_FIX", "compile_stub", "cuda_environment", "find_provider"]

SOURCE = Path(__file__).with_name("cuda_stub.c")
CUDA_FIX = (
    "make a virtual environment for it (`python3 -m venv .venv-cuda && "
    ".venv-cuda/bin/pip install onnxruntime-gpu`; no GPU and no CUDA are needed) and pass "
    "--cuda-python .venv-cuda/bin/python"
)
LIBRARY = re.compile(rb"lib(?:cuda|cudart|cublas|cublasLt|curand|cufft|cudnn)\.so\.\d+")
SYMBOL = re.compile(rb"\0((?:cuda|cudnn|curand|cufft|cublas|cublasLt|cu|__cuda)[A-Z][A-Za-z0-9_]+)")
# In the order of `enum counter` in cuda_stub.c
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
    """Yield environment variables under which ``python`` finds an NVIDIA GPU that computes nothing.

    Args:
        python: an interpreter with ``onnxruntime-gpu``.

    Raises:
        UnavailableError: ``onnxruntime-gpu`` or a C compiler is missing.
    """
    library = find_provider(python)
    with tempfile.TemporaryDirectory(prefix="gemma3-export-cuda-stub-") as name:
        folder = Path(name)
        stub = compile_stub(library, folder)
        searched = [name, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        yield {
            TELEMETRY_OFF: "1",
            **os.environ,
            "LD_PRELOAD": str(stub),
            "LD_LIBRARY_PATH": os.pathsep.join(searched),
        }


def find_provider(python: Path) -> Path:
    """Return the file of ONNX Runtime's CUDA provider in the packages of ``python``.

    Raises:
        UnavailableError: ``onnxruntime-gpu`` is missing.
    """
    program = "import importlib.util as u; s = u.find_spec('onnxruntime'); print(s and s.origin)"
    try:
        done = subprocess.run(  # noqa: S603  (the caller chose the interpreter)
            [str(python), "-P", "-c", program], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(
            f"{python} is not Python 3.11 or newer: {error}; name another interpreter"
        ) from error
    library = Path(done.stdout.strip()).parent / "capi" / PROVIDER
    if not library.is_file():
        raise UnavailableError(f"{python} does not have onnxruntime-gpu; {CUDA_FIX}")
    return library


def compile_stub(library: Path, folder: Path) -> Path:
    """Compile the stub into ``folder``, and link to it under the name of each library it replaces.

    Raises:
        UnavailableError: there is no C compiler.
        Gemma3ExportError: the stub does not compile.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnavailableError(
            "the CUDA stub needs a C compiler, and none is installed; on Debian and Ubuntu: "
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
    """Return the CUDA libraries that ``library`` needs, and the symbols it imports from them."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names = {match[0].decode() for match in LIBRARY.finditer(data)}
        symbols = {match[1].decode() for match in SYMBOL.finditer(data)}
    return names | set(LOADED_LATER), symbols
