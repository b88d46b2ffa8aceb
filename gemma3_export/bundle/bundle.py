"""The bundle: one folder that stands alone and says what it is.

    config.json generation_config.json tokenizer.json tokenizer_config.json
    onnx/model.onnx  onnx/model.onnx_data  onnx/model_windowed.onnx
    torchscript/model.ts  pt2/model.pt2
    manifest.json    format version, graphs, signature, origin and SHA-256 of everything
    parity.json      the proof of each graph that was verified, by runtime

Reading a bundle needs neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from gemma3_export.bundle.block_format import BlockFormat
from gemma3_export.bundle.signature import DType, Signature
from gemma3_export.bundle.typed_json import from_json
from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.config.hugging_face import load_config
from gemma3_export.errors import InputError
from gemma3_export.staging import write_text_atomically

__all__ = [
    "DEFAULT_MAX_KLD",
    "FORMAT_VERSION",
    "MANIFEST",
    "PARITY",
    "RUNTIMES",
    "Bundle",
    "FileRecord",
    "Graph",
    "Manifest",
    "WeightRecipe",
    "default_max_kld",
    "require_max_kld",
    "sha256_of",
]

FORMAT_VERSION = 1
RUNTIMES = ("onnx", "torchscript", "pt2", "reference")  # what runs a bundle; all but the last
# have a graph of their own in it
MANIFEST = "manifest.json"
PARITY = "parity.json"
DEFAULT_MAX_KLD = 0.01  # nats a token: what 8-bit weights keep to with room to spare
MAX_KLDS = {"int4": 0.1, "mixed": 0.05}  # where it is another one
MANIFEST_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRecipe:
    """How a graph's stored tensor is made of canonical weights.

    Rows are concatenated, then transposed, or quantised in blocks.

    The recipe is also what turns a bundle back into a state dict, so that a bundle can be verified
    without the weights that it came from.
    """

    names: tuple[str, ...]
    transposed: bool = False
    blocks: BlockFormat | None = None  # quantised; see gemma3_export.bundle.block_format


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and hash of one file of the bundle."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """One executable form of the model inside a bundle."""

    runtime: str  # one of RUNTIMES
    path: str  # relative, with forward slashes
    dtype: str  # as --dtype named it: fp32, bf16, int8, ...
    target: str  # which form of it, such as portable or ort
    cache_dtype: DType
    weights: dict[str, WeightRecipe]  # stored tensor -> canonical weights
    windowed_path: str | None = None  # the same graph with caches that let go of old tokens
    is_screened: bool = False  # its head can give candidates: exporters/screened_head.py
    max_kld: float = DEFAULT_MAX_KLD  # the divergence that the export was allowed
    calibration: dict[str, Any] | None = None  # the text that quantisation looked at
    verified: bool = False  # parity.json holds this graph's proof


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What ``manifest.json`` holds."""

    graphs: list[Graph]
    source: dict[str, Any]  # the fingerprint of the weights
    versions: dict[str, str]  # of the packages that made the bundle
    files: dict[str, FileRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class Bundle:
    """An exported model on disk.

    Raises:
        InputError: the folder is no bundle, or a newer or damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        self.config: Gemma3Config = load_config(path / "config.json")

    def graph(self, runtime: str) -> Graph:
        """The graph for ``runtime``.

        Raises:
            InputError: this bundle has none.
        """
        for graph in self.manifest.graphs:
            if graph.runtime == runtime:
                return graph
        present = ", ".join(graph.runtime for graph in self.manifest.graphs) or "none"
        raise InputError(
            f"{self.path} has no {runtime} graph (it has: {present}); "
            f"export one with `gemma3-export {runtime}`"
        )

    def is_quantized(self, runtime: str) -> bool:
        """Whether the graph for ``runtime`` holds other weights than it was made from."""
        return any(
            recipe.blocks is not None
            for graph in self.manifest.graphs
            if graph.runtime == runtime
            for recipe in graph.weights.values()
        )

    def max_kld(self, runtime: str) -> float:
        """How far the graph for ``runtime`` may lie from full precision, mean nats a token."""
        budgets = [graph.max_kld for graph in self.manifest.graphs if graph.runtime == runtime]
        return budgets[0] if budgets else DEFAULT_MAX_KLD

    def signature(self, graph: Graph, *, is_windowed: bool = False) -> Signature:
        """The inputs and outputs of ``graph``, or of its windowed sibling."""
        return Signature.of(
            self.config,
            cache_dtype=graph.cache_dtype,
            is_windowed=is_windowed,
            is_screened=is_windowed and graph.is_screened,
        )

    def file_bytes(self, relative: str) -> int:
        """Size of one file; 0 if the bundle has none of this name."""
        record = self.manifest.files.get(relative)
        return record.size_bytes if record else 0

    def file(self, relative: str) -> Path:
        """Absolute path of a bundle file."""
        return self.path.joinpath(*PurePosixPath(relative).parts)

    def check_files(self, only: Sequence[str] | None = None) -> None:
        """Compare sizes and SHA-256 hashes with the manifest.

        Args:
            only: relative paths to check; None means all.

        Raises:
            InputError: files are missing or differ; all of them are named.
        """
        problems = []
        for relative, record in self.manifest.files.items():
            if only is not None and relative not in only:
                continue
            problem = _file_problem(self.file(relative), record)
            if problem:
                problems.append(f"{relative}: {problem}")
        if problems:
            raise InputError(
                f"{self.path} is not what was exported: {'; '.join(problems)}. "
                "Copy the bundle again or export it anew"
            )

    def check_sizes(self) -> None:
        """The cheap part of :meth:`check_files`: every file is there and has its size.

        Raises:
            InputError: files are missing or have another size.
        """
        problems = []
        for relative, record in self.manifest.files.items():
            path = self.file(relative)
            if not path.is_file():
                problems.append(f"{relative} is missing")
            elif path.stat().st_size != record.size_bytes:
                problems.append(
                    f"{relative} has {path.stat().st_size} bytes instead of {record.size_bytes}"
                )
        if problems:
            raise InputError(
                f"{self.path} is damaged: {'; '.join(problems)}. "
                "Copy the bundle again or export it anew"
            )


def default_max_kld(dtype: str) -> float:
    """The divergence, mean nats a token, that an export as ``dtype`` is allowed."""
    return MAX_KLDS.get(dtype, DEFAULT_MAX_KLD)


def require_max_kld(max_kld: float) -> float:
    """``max_kld``, mean nats a token, if it is a divergence that can be allowed.

    Raises:
        InputError: it is no positive number.
    """
    if not 0 < max_kld < math.inf:
        raise InputError(
            f"the divergence budget is {max_kld}; give a positive number of nats a token, "
            "such as 0.05"
        )
    return max_kld


def write_manifest(path: Path, manifest: Manifest, hashes: Mapping[str, str]) -> None:
    """Record every file under ``path`` and write ``manifest.json``.

    Args:
        path: the bundle's folder.
        manifest: everything but ``files``, which is filled here.
        hashes: SHA-256 of files that the writer hashed as it wrote them.
    """
    manifest.files = {}
    for relative in _files_below(path):
        file = path / relative
        manifest.files[relative] = FileRecord(
            sha256=hashes.get(relative) or sha256_of(file), size_bytes=file.stat().st_size
        )
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"
    write_text_atomically(path / MANIFEST, text)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_below(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path).as_posix()
        if file.is_file() and relative != MANIFEST:
            yield relative


def _file_problem(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != record.size_bytes:
        return f"{size} bytes instead of {record.size_bytes}"
    if sha256_of(path) != record.sha256:
        return "SHA-256 differs"
    return None


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{path} is not a gemma3-export bundle (no {MANIFEST}); "
            "make one with `gemma3-export onnx --size 270m -o DIR`"
        )
    if file.stat().st_size > MANIFEST_LIMIT_BYTES:
        raise InputError(f"{file} is larger than {MANIFEST_LIMIT_BYTES} bytes; it is damaged")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error!r:.200}; export the bundle anew") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has bundle format version {version!r:.20} and this gemma3-export reads "
            f"{FORMAT_VERSION}; upgrade gemma3-export or export the bundle anew"
        )
    try:
        manifest = from_json(Manifest, data)
        assert isinstance(manifest, Manifest)
        _check_graphs(manifest)
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}; export the bundle anew") from error
    return manifest


def _check_graphs(manifest: Manifest) -> None:
    """Refuse paths that lead out of the bundle, and graphs that contradict the rest.

    Raises:
        ValueError: naming the path.
    """
    for relative in manifest.files:
        _check_inside(relative)
    runtimes = [graph.runtime for graph in manifest.graphs]
    if twice := [name for name in runtimes if runtimes.count(name) > 1]:
        raise ValueError(f"it has {len(twice)} graphs for the runtime {twice[0]}")
    for graph in manifest.graphs:
        if graph.cache_dtype == "int64":
            raise ValueError(f"the cache of {graph.path!r:.60} is int64; it must be of floats")
        for path in (graph.path, graph.windowed_path):
            if path is not None and path not in manifest.files:
                _check_inside(path)
                raise ValueError(f"the graph {path!r:.60} is not among its files")


def _check_inside(relative: str) -> None:
    parts = PurePosixPath(relative).parts
    if not parts or relative.startswith("/") or ".." in parts or "\\" in relative:
        raise ValueError(f"path {relative!r:.60} leads out of the bundle")
