"""``manifest.json``: the description of a bundle, written last and read first.

It lists the graphs with their cache types and the recipe of every stored weight, the origin of the
weights, the versions of the packages that made the bundle, and the size and SHA-256 of every file.
Large files also have the hash of a sample, which is cheap enough to compare whenever one is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from gemma3_export.bundle.block_format import BlockFormat
from gemma3_export.bundle.variants import DEFAULT_STEM, variant_name
from gemma3_export.dtypes import DEFAULT_MAX_KLD, EXPORT_DTYPES, DType
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, open_regular, to_path
from gemma3_export.records import Count, read_record
from gemma3_export.staging import DOCUMENTS, write_text_atomically

__all__ = [
    "CARD",
    "DOCUMENTS",
    "FORMAT_VERSION",
    "FULLY_HASHED_BYTES",
    "FUSED_TARGETS",
    "GIT_ATTRIBUTES",
    "MANIFEST",
    "NOTICE",
    "ONNX_TARGETS",
    "PARITY",
    "PLOT",
    "RUNTIMES",
    "BundleRuntime",
    "FileRecord",
    "Graph",
    "Manifest",
    "WeightRecipe",
    "default_graph",
    "manifest_to_json",
    "read_manifest",
    "sample_sha256_of",
    "sha256_of",
    "source_identity",
    "write_manifest",
]

# 2 added samples of large files; 3 variants, with parity.json by graph; 5 transposed integers.
# Format 4 is rejected: such bundles can have graphs of their own for prompts, which nothing runs.
FORMAT_VERSION = 5
READABLE_VERSIONS = (1, 2, 3, FORMAT_VERSION)
# Backends that run a bundle. All but the reference have a graph of their own in it.
BundleRuntime = Literal["onnx", "torchscript", "pt2", "reference"]
RUNTIMES: tuple[BundleRuntime, ...] = get_args(BundleRuntime)
# ONNX Runtime's fused kernels, standard operators only, or what onnxruntime-web runs fast
ONNX_TARGETS = ("ort", "portable", "web")
FUSED_TARGETS = ("ort", "web")  # those with GroupQueryAttention, which extends a cache in place
MANIFEST = "manifest.json"
PARITY = "parity.json"
PLOT = "parity.svg"
CARD, GIT_ATTRIBUTES, NOTICE = DOCUMENTS  # their hashes tell whether somebody edited them
REMEDY = "export the bundle again"
FULLY_HASHED_BYTES = 2**25  # up to here, such as tokenizers, loading hashes a file in full
HASH_BYTES = 2**20  # read at a time
# The sample of a file: blocks at equal distances, the first at its start and the last at its end.
# Part of the format: other numbers need another format version.
SAMPLE_BLOCKS = 64
SAMPLE_BLOCK_BYTES = 2**14
# Entry of ONNX Runtime's session configuration. On x86 without VNNI, sums of two products of an
# unsigned and a signed byte saturate at 16 bits unless this is "1". With VNNI, where they are exact
# anyway, it makes them slower.
EXACT_PRODUCTS = "session.x64quantprecision"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRecipe:
    """Recipe that makes a stored tensor of a graph from canonical weights.

    Rows are concatenated, then quantized or transposed, or both. Inverting the recipe recovers the
    canonical weights, so a bundle can be verified without the checkpoint that it was made from.
    """

    names: tuple[str, ...]
    transposed: bool = False
    blocks: BlockFormat | None = None  # None: not quantized


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and hashes of one file of a bundle."""

    sha256: str
    size_bytes: Count
    sample_sha256: str | None = None  # of large files; None in bundles of format 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """One executable graph of a bundle."""

    runtime: str  # one of RUNTIMES
    path: str  # relative, with forward slashes
    dtype: str  # as --dtype names it: fp32, bf16, int8, ...
    target: str  # such as portable or ort
    cache_dtype: DType
    weights: dict[str, WeightRecipe]  # stored tensor -> canonical weights
    residual_dtype: DType = "float32"  # of the residual stream
    takes_no_logits: bool = False  # a step may ask for none: num_logits_to_keep is -T
    windowed_path: str | None = None  # the same model with sliding-window caches
    is_screened: bool = False  # windowed_path screens its head: exporters/onnx/screened_head.py
    max_kld: float = DEFAULT_MAX_KLD  # divergence budget of the parity check, mean nats per token
    calibration: dict[str, Any] | None = None  # the text that quantization used
    verified: bool = False  # parity.json holds this graph's report
    min_onnxruntime: str | None = None  # oldest release that runs path; None: not recorded

    @property
    def variant(self) -> str:
        """Return the variant's name, such as ``int8``: see :mod:`gemma3_export.bundle.variants`."""
        if self.runtime != "onnx":  # elsewhere, the dtype implies the type of activations
            return variant_name(self.dtype)
        return variant_name(self.dtype, self.cache_dtype)

    @property
    def own_files(self) -> frozenset[str]:
        """Return the relative paths of the files that the graph may have to itself."""
        return frozenset(name for path in self.paths for name in (path, f"{path}_data"))

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the relative paths of all ``.onnx`` files, or of the archive."""
        return tuple(path for path in (self.path, self.windowed_path) if path is not None)

    @property
    def is_fused(self) -> bool:
        """True if GroupQueryAttention extends the cache in place."""
        return self.target in FUSED_TARGETS

    @property
    def session_entries(self) -> dict[str, str]:
        """Session options of ONNX Runtime with which results are right on every processor."""
        is_signed = any(recipe.blocks and recipe.transposed for recipe in self.weights.values())
        return {EXACT_PRODUCTS: "1"} if is_signed else {}

    @property
    def requires_num_logits(self) -> bool:
        """True if ``num_logits_to_keep`` is a scalar without a default."""
        return self.target == "web"


@dataclass(kw_only=True, slots=True)
class Manifest:
    """The content of ``manifest.json``."""

    graphs: list[Graph]
    source: dict[str, Any]  # fingerprint of the weights
    versions: dict[str, str]  # of the packages that made the bundle
    files: dict[str, FileRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def default_graph(graphs: Sequence[Graph]) -> Graph:
    """Return the graph of a runtime that runs if no variant is chosen.

    That is the one in ``model.onnx`` (for torch archives ``model.ts`` or ``model.pt2``), otherwise
    the one that was exported first.
    """
    named = (graph for graph in graphs if PurePosixPath(graph.path).stem == DEFAULT_STEM)
    return next(named, graphs[0])


def write_manifest(path: Path, manifest: Manifest, hashes: Mapping[str, str]) -> None:
    """Record every file under ``path`` and write ``manifest.json``.

    Args:
        path: the bundle's folder.
        manifest: complete except for ``files``, which this function fills in.
        hashes: known SHA-256 of files, by relative path; other files are hashed now.
    """
    manifest.files = {}
    for relative in _files_below(path):
        file = path / relative
        size = file.stat().st_size
        manifest.files[relative] = FileRecord(
            sha256=hashes.get(relative) or sha256_of(file),
            size_bytes=size,
            sample_sha256=sample_sha256_of(file) if size > FULLY_HASHED_BYTES else None,
        )
    write_text_atomically(path / MANIFEST, manifest_to_json(manifest))


def manifest_to_json(manifest: Manifest) -> str:
    """Return the content of ``manifest.json``."""
    return json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"


def source_identity(source: Mapping[str, Any]) -> object:
    """Return what fingerprints of the same weights share: hashes of files, and what was kept."""
    files = source.get("files")
    if not files:
        return dict(source)
    return sorted(files.values()), source.get("reduced_vocabulary")


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the hexadecimal SHA-256 of a file; ``on_bytes`` gets the size of each part of it."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def sample_sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a sample of a file: 1 MiB, however large the file is.

    Damage to a stretch of more than a 63rd of the file always shows, and so do other weights; an
    edit of a few bytes usually does not.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        last = max(0, file.seek(0, 2) - SAMPLE_BLOCK_BYTES)
        for index in range(SAMPLE_BLOCKS):
            file.seek(last * index // (SAMPLE_BLOCKS - 1))
            digest.update(file.read(SAMPLE_BLOCK_BYTES))
    return digest.hexdigest()


def _files_below(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path).as_posix()
        if file.is_file() and relative != MANIFEST:
            yield relative


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the bundle at ``path``.

    Raises:
        InputError: the folder is not a bundle, or its manifest is damaged or has another version.
    """
    file = path / MANIFEST
    if not is_file(file):
        if not path.exists():
            raise InputError(
                f"{path} does not exist; make a bundle with `gemma3-export onnx --size 270m -o DIR`"
            )
        raise InputError(
            f"{path} is not a gemma3-export bundle (no {MANIFEST}); "
            "make one with `gemma3-export onnx --size 270m -o DIR`"
        )
    manifest = read_record(file, Manifest, remedy=REMEDY, format_versions=READABLE_VERSIONS)
    try:
        _check_graphs(manifest)
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}; {REMEDY}") from error
    return manifest


def _check_graphs(manifest: Manifest) -> None:
    """Reject paths that lead out of the bundle, and graphs that contradict the rest.

    Raises:
        ValueError: with the path or runtime in question.
    """
    for relative in manifest.files:
        _check_inside(relative)
    names = [f"{graph.runtime} {graph.variant}" for graph in manifest.graphs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"it has {len(twice)} graphs called {twice[0]!r:.60}")
    for graph in manifest.graphs:
        if graph.dtype not in EXPORT_DTYPES:
            raise ValueError(f"the dtype {graph.dtype!r:.60} of a graph is unknown")
        if graph.cache_dtype == "int64":
            raise ValueError(
                f"the cache of {graph.path!r:.60} is int64; it must be a floating-point type"
            )
        for path in graph.paths:
            if path not in manifest.files:
                _check_inside(path)
                raise ValueError(f"the graph {path!r:.60} is not among its files")


def _check_inside(relative: str) -> None:
    parts = PurePosixPath(relative).parts
    # Windows reads "\\" as "/", and "C:" as a drive.
    if not parts or relative.startswith("/") or ".." in parts or set("\\:") & set(relative):
        raise ValueError(f"path {relative!r:.60} leads out of the bundle")
    try:
        to_path(relative, "the file")
    except InputError as error:
        raise ValueError(str(error)) from error
