"""Find the peers that a benchmark measures a bundle against.

Some run in this environment (:data:`BUILT_IN_PEERS`). Every other engine has its own environment,
which a checkout sets up with ``python -m benchmarks.peers``. All that a benchmark needs to know
about such a peer is in a file next to the peer's model:

    DIR/models/NAME-FORMAT/peer.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma3_export.bundle.manifest import source_identity
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.records import read_json, to_record

__all__ = [
    "BUILT_IN_PEERS",
    "DEFAULT_FOLDER",
    "ENGINES",
    "InstalledPeer",
    "check_peer",
    "find_peer",
    "installed_peers",
    "model_folder",
    "setup_command",
    "split_spec",
]

DEFAULT_FOLDER = Path(".cache/peers")
DESCRIPTION = "peer.json"
# "static" is a static cache with compiled decode steps.
BUILT_IN_PEERS = ("transformers", "transformers:static", "reference")
# The engines that a checkout sets up, and the weight formats that each engine's own tools produce.
# The first format is the default.
ENGINES: dict[str, tuple[str, ...]] = {
    "transformers.exporters": ("fp32", "int8"),
    "optimum-onnx": ("fp32",),
    "onnxruntime-genai": ("fp32", "int4"),
    "onnxruntime-genai-cuda": ("bf16", "fp16", "int4"),
    "llama.cpp": ("Q8_0", "Q4_0", "Q4_K_M", "BF16", "F32"),
    "openvino": ("int8", "int4", "fp32"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledPeer:
    """An engine with one of its models, both ready to use."""

    name: str
    weight_format: str
    command: tuple[str, ...]  # starts a worker, see gemma3_export.bench.serving
    made_from: dict[str, Any]  # fingerprint of the weights, as in a bundle's manifest
    model: Path  # the folder that contains the description

    @property
    def spec(self) -> str:
        """Return ``NAME:FORMAT``, as ``--against`` takes it."""
        return f"{self.name}:{self.weight_format}"

    @classmethod
    def read(cls, model: Path) -> InstalledPeer:
        """Read the description in a model's folder.

        Raises:
            InputError: the file is damaged.
        """
        file = model / DESCRIPTION
        remedy = "set the peer up again, with --force"
        found = read_json(file, remedy=remedy)
        if isinstance(found, dict):
            found["model"] = str(model.resolve())
        return to_record(found, cls, where=str(file), remedy=remedy)

    def write(self) -> None:
        """Write the description into the model's folder."""
        described = asdict(self)
        del described["model"]
        text = json.dumps(described, indent=1) + "\n"
        (self.model / DESCRIPTION).write_text(text, encoding="utf-8")

    def missing_files(self) -> list[str]:
        """Return the files that the command names and that are gone."""
        paths = [part for part in self.command if Path(part).is_absolute()]
        return [path for path in paths if not Path(path).exists()]

    def check_weights(self, source: Mapping[str, Any]) -> None:
        """Compare with the fingerprint of a bundle's weights.

        Raises:
            InputError: the peer's model was made from other weights.
        """
        if source_identity(self.made_from) != source_identity(source):
            raise InputError(
                f"{self.spec} was made from {self.made_from.get('location')} and the bundle from "
                f"{source.get('location')}; make both from the same weights: "
                f"{setup_command(self.spec, self.model.parents[1])} --force"
            )


def model_folder(name: str, weight_format: str, folder: Path) -> Path:
    """Return the folder of a peer's model; ``folder`` contains all peers."""
    return folder / "models" / f"{name}-{weight_format}"


def installed_peers(folder: Path) -> Iterator[InstalledPeer]:
    """Read the descriptions of all peers that are set up in ``folder``.

    Raises:
        InputError: a description is damaged.
    """
    for file in sorted(folder.glob(f"models/*/{DESCRIPTION}")):
        yield InstalledPeer.read(file.parent)


def split_spec(spec: str) -> tuple[str, str]:
    """Split ``NAME`` or ``NAME:FORMAT``; a known engine without a format gets its default.

    Raises:
        InputError: the engine is known and does not have this format.
    """
    name, _, weight_format = spec.partition(":")
    known = ENGINES.get(name)
    if known is None:
        return name, weight_format
    weight_format = weight_format or known[0]
    if weight_format not in known:
        raise InputError(f"{name} has no format {weight_format!r}; choose {', '.join(known)}")
    return name, weight_format


def check_peer(spec: str, folder: Path) -> None:
    """Check that ``spec`` names a peer, whether or not it is set up.

    Raises:
        InputError: the name or the format is unknown; the message lists the choices.
    """
    if spec in BUILT_IN_PEERS:
        return
    name, weight_format = split_spec(spec)
    if name in ENGINES:
        return
    found = [peer for peer in installed_peers(folder) if peer.name == name]
    if not any(weight_format in ("", peer.weight_format) for peer in found):
        specs = (peer.spec for peer in installed_peers(folder))
        choices = dict.fromkeys((*BUILT_IN_PEERS, *ENGINES, *specs))
        raise InputError(f"unknown peer {spec!r}; choose {', '.join(choices)}")


def find_peer(spec: str, folder: Path) -> InstalledPeer:
    """Return the installed peer that ``spec`` (``NAME`` or ``NAME:FORMAT``) names.

    Raises:
        InputError: the name or the format is unknown.
        UnavailableError: the engine is not set up; the message gives the command that does it.
    """
    check_peer(spec, folder)
    name, weight_format = split_spec(spec)
    for peer in installed_peers(folder):
        if peer.name == name and weight_format in ("", peer.weight_format):
            if missing := peer.missing_files():
                raise UnavailableError(
                    f"{peer.spec} is not set up completely ({missing[0]} is missing); set it up "
                    f"from a checkout: {setup_command(peer.spec, folder)} --force"
                )
            return peer
    raise UnavailableError(
        f"{name}:{weight_format} is not set up in {folder}; set it up from a checkout: "
        f"{setup_command(f'{name}:{weight_format}', folder)}"
    )


def setup_command(spec: str, folder: Path) -> str:
    """Return the command that sets a peer up."""
    option = "" if folder == DEFAULT_FOLDER else f" --peers {folder}"
    return f"python -m benchmarks.peers {spec} --weights WEIGHTS{option}"
