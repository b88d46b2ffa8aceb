"""``manifest.json``: what a bundle says about itself, written last and read first.

It names the graphs with the recipe of every stored weight, the signature's cache type, the origin
of the weights, the versions of the packages that made it, and the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gemma3_export.bundle.block_format import BlockFormat
from gemma3_export.dtypes import DEFAULT_MAX_KLD, DType
from gemma3_export.errors import InputError
from gemma3_export.staging import write_text_atomically

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "ONNX_TARGETS",
    "PARITY",
    "RUNTIMES",
    "FileRecord",
    "Graph",
    "Manifest",
    "WeightRecipe",
    "read_manifest",
    "sha256_of",
    "write_manifest",
]

FORMAT_VERSION = 1
RUNTIMES = ("onnx", "torchscript", "pt2", "reference")  # what runs a bundle; all but the last
# have a graph of their own in it
ONNX_TARGETS = ("ort", "portable")  # of ONNX graphs: fused kernels, or standard operators only
MANIFEST = "manifest.json"
PARITY = "parity.json"
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
    is_screened: bool = False  # its head can give candidates: exporters/onnx/screened_head.py
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


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the bundle at ``path``.

    Raises:
        InputError: the folder is not a bundle, or its manifest is damaged or of another version.
    """
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


# JSON as dataclasses, every value checked against its annotation.

WORDS = {str: "a string", bool: "true or false", int: "a whole number", NoneType: "null"}


def from_json(kind: Any, data: object, where: str = "") -> Any:
    """``data`` as ``kind``, which is made of dataclasses, containers, unions and plain types.

    Args:
        kind: an annotation; ``Any`` lets everything pass.
        data: what ``json.loads`` gave.
        where: names ``data`` in errors.

    Raises:
        ValueError: a value is absent, unknown or of another type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _record(kind, _object(data, where), where)
    if origin in (Union, UnionType):
        return None if data is None else from_json(_not_none(parts), data, where)
    if origin is Literal:
        return _checked(data in parts, data, where, f"one of {', '.join(map(str, parts))}")
    if origin is dict:
        items = _object(data, where).items()
        return {key: from_json(parts[1], value, _below(where, key)) for key, value in items}
    if origin in (list, tuple):
        _checked(isinstance(data, list), data, where, "a list")
        assert isinstance(data, list)
        return origin(from_json(parts[0], value, f"{where}[{i}]") for i, value in enumerate(data))
    if kind is float:
        is_number = type(data) in (int, float) and math.isfinite(data)  # type: ignore[arg-type]
        return _checked(is_number, data, where, "a finite number")
    return _checked(type(data) is kind, data, where, WORDS[kind])


def _record(kind: Any, data: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    if unknown := data.keys() - known.keys():
        raise ValueError(f"{_below(where, min(unknown))} is unknown")
    for name, item in known.items():
        has_default = item.default is not MISSING or item.default_factory is not MISSING
        if name not in data and not has_default:
            raise ValueError(f"{_below(where, name)} is missing")
    return kind(
        **{name: from_json(hints[name], value, _below(where, name)) for name, value in data.items()}
    )


def _not_none(parts: tuple[Any, ...]) -> Any:
    (kind,) = (part for part in parts if part is not NoneType)
    return kind


def _object(data: object, where: str) -> dict[str, Any]:
    _checked(isinstance(data, dict), data, where, "an object")
    assert isinstance(data, dict)
    return data


def _checked(is_right: bool, data: object, where: str, words: str) -> Any:
    if not is_right:
        raise ValueError(f"{where or 'it'} is {data!r:.60}; it must be {words}")
    return data


def _below(where: str, key: str) -> str:
    return f"{where}.{key:.60}" if where else f"{key:.60}"
