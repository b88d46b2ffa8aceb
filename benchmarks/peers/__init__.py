"""Other engines that run Gemma 3, each in its own virtual environment.

    DIR/NAME/                            the environment
    DIR/models/NAME-FORMAT/              the engine's model
    DIR/models/NAME-FORMAT/peer.json     how to start it, and the weights that it was made from

``python -m benchmarks.peers`` creates all three. ``gemma3-export bench --against NAME`` reads the
description and starts the environment's Python with a module of ``workers/``, which does not need
gemma3-export.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import python_of
from gemma3_export.bench import serving

__all__ = ["PEERS", "SERVING", "WORKERS", "Peer"]

HERE = Path(__file__).resolve().parent
WORKERS = HERE / "workers"
SERVING = Path(serving.__file__).resolve()
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() == "x86_64" else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An engine to install, and its worker.

    ``gemma3_export.bench.peers.ENGINES`` has its formats.
    """

    name: str
    module: str  # a file of WORKERS
    build: tuple[tuple[str, str], ...] = ()  # environment variables for pip
    pins_dependencies: bool = True  # the requirements name every package, dependencies included

    @property
    def requirements(self) -> Path:
        """Return the file with the exact version of every package to install."""
        return HERE / "requirements" / f"{self.name}.txt"

    def python(self, folder: Path) -> Path:
        """Return the interpreter of the environment; ``folder`` contains all peers."""
        return python_of(folder / self.name)

    def command(self, folder: Path) -> tuple[str, ...]:
        """Return the command that starts the worker.

        ``-P`` keeps the modules next to ``serving.py`` from shadowing installed packages.
        """
        worker = WORKERS / f"{self.module}.py"
        return (str(self.python(folder)), "-P", str(SERVING), str(worker))


PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="transformers.exporters", module="transformers_exporters_worker"),
        Peer(name="optimum-onnx", module="optimum_worker"),
        Peer(name="onnxruntime-genai", module="genai_worker"),
        Peer(
            name="llama.cpp",
            module="llama_cpp_worker",
            # As llama.cpp builds by default: for this processor, without the tools that we do not
            # use. Its AMX kernels crash on the shapes of Gemma 3 270M (ggml_backend_amx_mul_mat).
            build=(
                ("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"),
                ("CFLAGS", NO_AMX),
                ("CXXFLAGS", NO_AMX),
                ("PIP_NO_CACHE_DIR", "1"),  # a cached wheel may be built for another processor
            ),
        ),
        Peer(
            name="onnxruntime-genai-cuda",
            module="genai_cuda_worker",
            pins_dependencies=False,  # the CUDA libraries are dependencies of the listed packages
        ),
        Peer(name="openvino", module="openvino_worker"),
    )
}
