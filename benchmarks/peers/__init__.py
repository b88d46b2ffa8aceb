"""Other engines that run Gemma 3, each in a virtual environment of its own.

    DIR/NAME/                 the environment
    DIR/models/NAME-FORMAT/   the peer's model, and made_from.json: which weights it was made from

``python -m benchmarks.peers`` makes both; a benchmark starts the peer's Python with a worker of
``workers/``, which needs nothing of this package.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3_export.errors import InputError, UnavailableError

__all__ = ["DEFAULT_PLACE", "MADE_FROM", "PEERS", "InstalledPeer", "Peer", "find_peer"]

DEFAULT_PLACE = Path(".cache/peers")
MADE_FROM = "made_from.json"
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() == "x86_64" else ""
HERE = Path(__file__).parent
WORKERS = HERE / "workers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An engine to compare with."""

    name: str
    module: str  # the worker, a file of WORKERS
    formats: tuple[str, ...]  # what its own tools make of float32 weights; the first is the default
    build: tuple[tuple[str, str], ...] = ()  # environment variables of its installation
    lists_all: bool = True  # whether the requirements name every package, or only the chosen ones

    @property
    def requirements(self) -> Path:
        """Exact versions of everything in the environment."""
        return HERE / "requirements" / f"{self.name}.txt"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="optimum-onnx", module="optimum_worker", formats=("fp32",)),
        Peer(name="onnxruntime-genai", module="genai_worker", formats=("fp32", "int4")),
        Peer(
            name="llama.cpp",
            module="llama_cpp_worker",
            formats=("Q8_0", "Q4_0", "Q4_K_M", "BF16", "F32"),
            # As llama.cpp builds by default: for this processor, without tools that go unused. But
            # its AMX products crash on Gemma 3 270M's shapes (measured: ggml_backend_amx_mul_mat).
            build=(
                ("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"),
                ("CFLAGS", NO_AMX),
                ("CXXFLAGS", NO_AMX),
                ("PIP_NO_CACHE_DIR", "1"),  # a wheel from there was built for whatever it was
            ),
        ),
        Peer(
            name="onnxruntime-genai-cuda",
            module="genai_cuda_worker",
            formats=("bf16", "fp16", "int4"),
            lists_all=False,  # CUDA's libraries come as what they depend on
        ),
        Peer(name="openvino", module="openvino_worker", formats=("int8", "int4", "fp32")),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledPeer:
    """A peer's environment and one of its models, both in place."""

    peer: Peer
    form: str  # one of the peer's formats
    python: Path
    model: Path

    @property
    def name(self) -> str:
        """As ``--against`` takes it, with the format."""
        return f"{self.peer.name}:{self.form}"

    @property
    def command(self) -> list[str]:
        """What starts the worker."""
        return [str(self.python), str(WORKERS / "serving.py"), self.peer.module]

    def check_weights(self, source: dict[str, Any]) -> None:
        """Compare with the fingerprint of a bundle's weights.

        Raises:
            InputError: the peer's model was made from other weights.
        """
        theirs = json.loads((self.model / MADE_FROM).read_text(encoding="utf-8"))
        if identity(theirs) != identity(source):
            raise InputError(
                f"{self.name} was made from {theirs.get('location')} and the bundle from "
                f"{source.get('location')}; make both from the same weights: "
                f"{setup_command(self.peer.name, self.form, self.python.parents[2])} --force"
            )


def parse(spec: str) -> tuple[Peer, str]:
    """Split ``NAME`` or ``NAME:FORMAT``.

    Raises:
        InputError: no such peer or format.
    """
    name, _, form = spec.partition(":")
    if name not in PEERS:
        raise InputError(f"unknown peer {name!r}; choose {', '.join(PEERS)}")
    peer = PEERS[name]
    form = form or peer.formats[0]
    if form not in peer.formats:
        raise InputError(f"{name} has no format {form!r} here; choose {', '.join(peer.formats)}")
    return peer, form


def find_peer(spec: str, place: Path) -> InstalledPeer:
    """The peer that ``spec`` (``NAME`` or ``NAME:FORMAT``) means.

    Raises:
        InputError: no such peer or format.
        UnavailableError: it is not installed, with the command that installs it.
    """
    peer, form = parse(spec)
    python, model = python_of(peer, place), model_of(peer, form, place)
    missing = [path for path in (python, model / MADE_FROM) if not path.exists()]
    if missing:
        raise UnavailableError(
            f"{peer.name}:{form} is not set up ({missing[0]} is missing); "
            f"run: {setup_command(peer.name, form, place)}"
        )
    return InstalledPeer(peer=peer, form=form, python=python.absolute(), model=model.resolve())


def python_of(peer: Peer, place: Path) -> Path:
    """The interpreter of a peer's environment."""
    return place / peer.name / "bin" / "python"


def model_of(peer: Peer, form: str, place: Path) -> Path:
    """The folder of a peer's model."""
    return place / "models" / f"{peer.name}-{form}"


def setup_command(name: str, form: str, place: Path) -> str:
    """What a person types to set a peer up."""
    into = "" if place == DEFAULT_PLACE else f" --peers {place}"
    return f"python -m benchmarks.peers {name}:{form} --weights WEIGHTS{into}"


def identity(source: dict[str, Any]) -> object:
    """What two fingerprints of the same weights share: the hashes, wherever the files lie."""
    files = source.get("files")
    return sorted(files.values()) if files else source
