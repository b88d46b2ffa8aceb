"""Write a bundle: config, tokenizer, graphs, manifest and parity reports, all or nothing.

Each graph writer adds its graph; this module adds everything else. The folder gets its name only
once it is complete, so a failed or interrupted export leaves no partial output.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from gemma3_export import __version__
from gemma3_export.bundle import (
    DOCUMENTS,
    GENAI_CONFIG,
    MANIFEST,
    PARITY,
    PLOT,
    Bundle,
    Graph,
    Manifest,
    default_graph,
    generation_config_to_json,
    write_genai_config,
    write_hf_metadata,
    write_manifest,
    write_transformers_js_config,
)
from gemma3_export.bundle.inspection import read_proofs
from gemma3_export.bundle.manifest import read_manifest
from gemma3_export.bundle.model_card import write_documents
from gemma3_export.config import CONFIG_NAME, TOKENIZER_NAME, Gemma3Config
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import is_file
from gemma3_export.parity.activation_range import (
    calibration_sequences,
    measure_ranges,
    require_range,
)
from gemma3_export.parity.options import HalfPrecision
from gemma3_export.parity.report.model import HalfRanges
from gemma3_export.parity.report.plot import render_plot
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.reference.weights import WeightSource
from gemma3_export.staging import reject_existing, staged_directory, write_text_atomically
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ExportResult",
    "GraphWriter",
    "Verification",
    "export_bundle",
    "finish_bundle",
    "half_precision",
    "stamp_bundle",
]


class GraphWriter(Protocol):
    """Writer of one executable graph of a bundle, and the options of its export."""

    runtime: ClassVar[str]  # the backend that runs it

    @property
    def variant(self) -> str:
        """The name of the variant: see :mod:`gemma3_export.bundle.variants`."""

    @property
    def path(self) -> str:
        """The path of the graph in the bundle, with forward slashes."""

    @property
    def half(self) -> HalfPrecision | None:
        """The parts of the graph in half precision, None if it computes in float32."""

    def size_bytes(self, config: Gemma3Config) -> int:
        """Return about how much space the files need."""

    def write(
        self, source: WeightSource, folder: Path, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        """Write the graph to ``folder``; return its record and the SHA-256 of known files."""


class Verification(Protocol):
    """Parity check of a bundle against the weights that it was made from."""

    def __call__(
        self, folder: Path, source: WeightSource, graph: Graph, ranges: HalfRanges | None = None
    ) -> str:
        """Return the parity report of one graph as JSON.

        Raises:
            ParityError: the bundle differs from the reference.
        """


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Result of an export."""

    path: Path
    graphs: tuple[Graph, ...]  # those that were written
    verified: bool
    size_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)  # by stage


def export_bundle(
    source: WeightSource,
    output: Path,
    *writers: GraphWriter,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
    verification: Verification | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export ``source`` to a bundle at ``output``, or add graphs to an existing bundle.

    Args:
        source: the weights and their config.
        output: the folder to create. If it is a bundle of the same weights, the graphs are added,
            and the folder is still replaced in one step.
        writers: each writes a graph; no two have the same runtime and variant.
        tokenizer: defaults to the tokenizer of the weights, if any.
        force: replace an existing folder.
        verification: the parity check; None skips it and records that in the manifest.
        progress: called with the stage and how much of it is done.

    Raises:
        InputError: the folder exists or has one of the graphs, or weights, config and tokenizer
            contradict each other.
        ParityError: a graph differs from the reference, or its activations overflow float16; there
            is no output.
        Gemma3ExportError: the disk is full or not writable.
    """
    report = progress or ignore_progress
    if tokenizer is not None:
        source.keep_rows(tokenizer.vocab_size)
    tokenizer = tokenizer or tokenizer_of(source)
    require_distinct(writers)
    existing = None if force else extendable_bundle(output, writers, source, tokenizer)
    if existing is None:
        reject_existing(output, force=force)
    if tokenizer is not None:
        tokenizer.check_vocab_size(source.config.vocab_size)
    require_space(output, sum(writer.size_bytes(source.config) for writer in writers))
    seconds: defaultdict[str, float] = defaultdict(float)
    started = time.perf_counter()
    is_verified = verification is not None
    ranges = {
        half: checked_ranges(half, source, tokenizer, is_verified, report)
        for half in dict.fromkeys(writer.half for writer in writers)
    }
    if any(ranges.values()):
        seconds["activation range"] += time.perf_counter() - started
    keeps = () if existing is None else DOCUMENTS
    with staged_directory(output, force=force or existing is not None, keeps=keeps) as folder:
        started = time.perf_counter()
        if existing is not None:  # again, now that no other process can add to it
            existing = extendable_bundle(output, writers, source, tokenizer)
            if existing is None:
                reject_existing(output, force=force)
        if existing is None:
            write_hf_metadata(folder, source.config, tokenizer, source.generation_config())
        else:
            link_files(existing, folder)
        report("hashing the source", 0, 1)
        fingerprint = source.fingerprint()
        report("hashing the source", 1, 1)
        manifest = Manifest(
            graphs=[] if existing is None else existing.manifest.graphs,
            source=fingerprint,
            versions=package_versions(),
            files={} if existing is None else existing.manifest.files,
        )
        added: list[Graph] = []
        for writer in writers:
            if len(writers) > 1:
                report(f"exporting {writer.variant}", 0, 1)
            graph, hashes = writer.write(source, folder, report)
            added.append(graph)
            add_graph(folder, manifest, graph, hashes, source)
            seconds["export"] += time.perf_counter() - started
            started = time.perf_counter()
            if verification is not None:
                proof = verification(folder, source, graph, ranges[writer.half])
                added[-1] = add_proof(folder, manifest, graph, proof)
                seconds["parity"] += time.perf_counter() - started
                started = time.perf_counter()
        finish_bundle(folder, source.config, manifest)
    return ExportResult(
        path=output,
        graphs=tuple(added),
        verified=is_verified,
        size_bytes=sum(record.size_bytes for record in manifest.files.values()),
        seconds=dict(seconds),
    )


def stamp_bundle(bundle: Bundle, graph: Graph, proof: str) -> None:
    """Give a graph of an existing bundle its proof; the folder is replaced in one step.

    Args:
        bundle: the bundle as it was proven.
        graph: one of its graphs.
        proof: the graph's parity report as JSON.

    Raises:
        InputError: another process changed the bundle meanwhile, or it must not be replaced.
        Gemma3ExportError: the disk is full or not writable.
    """
    with staged_directory(bundle.path, force=True, keeps=DOCUMENTS) as folder:
        manifest = read_manifest(bundle.path)
        if manifest != bundle.manifest:
            raise InputError(f"{bundle.path} changed while it was checked; verify it again")
        link_files(bundle, folder)
        add_proof(folder, manifest, graph, proof)
        finish_bundle(folder, bundle.config, manifest)


def finish_bundle(folder: Path, config: Gemma3Config, manifest: Manifest) -> None:
    """Write what follows from graphs and reports: the plot, missing documents and the manifest.

    The manifest keeps the hash of a document that somebody edited as it was before.

    Args:
        folder: the bundle, with its graphs, ``parity.json`` and a first manifest.
        config: the model.
        manifest: as that first one, with the verdicts; receives the final list of files.
    """
    proofs = read_proofs(folder)
    if plot := render_plot(proofs):
        write_text_atomically(folder / PLOT, plot)
    missing = [name for name in DOCUMENTS if not is_file(folder / name)]
    hashes = known_hashes(manifest, PARITY, PLOT, *missing)
    write_manifest(folder, manifest, hashes)
    write_documents(folder, config, manifest, proofs)
    write_manifest(folder, manifest, hashes)


def checked_ranges(
    half: HalfPrecision | None,
    source: WeightSource,
    tokenizer: Tokenizer | None,
    is_verified: bool,
    progress: Progress,
) -> HalfRanges | None:
    """Measure activations in half precision; float16 is checked even without a parity check.

    Raises:
        ParityError: activations come too close to the largest number of the type.
    """
    if half is None or not (is_verified or half.dtype == torch.float16):
        return None
    sequences = calibration_sequences(source.config, tokenizer)
    ranges = measure_ranges(source, sequences, half, progress)
    require_range(ranges)
    return ranges


def require_distinct(writers: Sequence[GraphWriter]) -> None:
    """Check that there are graphs to write, and that none would replace another.

    Raises:
        InputError: there are none, or two have the same name.
    """
    if not writers:
        raise InputError("there is nothing to export; give at least one dtype")
    names = [f"{writer.runtime} {writer.variant}" for writer in writers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"the {twice[0]} graph is requested {len(twice)} times; name it once")


def extendable_bundle(
    output: Path,
    writers: Sequence[GraphWriter],
    source: WeightSource,
    tokenizer: Tokenizer | None,
) -> Bundle | None:
    """Return the bundle at ``output`` if the graphs can be added to it; None if there is none.

    Raises:
        InputError: the bundle has one of the graphs, or was made from other weights, or with
            another tokenizer.
    """
    if not is_file(output / MANIFEST):
        return None
    bundle = Bundle(output)
    for writer in writers:
        bundle.require_vacant(writer.runtime, writer.variant, writer.path)
    runtime = writers[0].runtime
    if bundle.config != source.config or bundle.manifest.source != source.fingerprint():
        raise InputError(
            f"{output} is a bundle of other weights, so a {runtime} graph cannot be added; choose "
            "another output, or pass --force to replace the bundle"
        )
    if tokenizer is not None and not has_tokenizer(bundle, tokenizer):
        raise InputError(
            f"{output} is a bundle with another tokenizer or chat template, so a {runtime} graph "
            "cannot be added; pass the bundle's with --tokenizer, choose another output, or pass "
            "--force to replace the bundle"
        )
    return bundle


def has_tokenizer(bundle: Bundle, tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer of ``bundle`` is ``tokenizer``, with its chat templates."""
    if not is_file(bundle.path / TOKENIZER_NAME):
        return False
    with tempfile.TemporaryDirectory(prefix="gemma3-export-") as folder:
        tokenizer.save(folder)  # as the bundle's was
        stored, wanted = (Tokenizer.from_folder(path) for path in (bundle.path, Path(folder)))
    return (
        stored.to_json() == wanted.to_json()
        and stored.special_tokens() == wanted.special_tokens()
        and stored.settings.templates == wanted.settings.templates
    )


def link_files(bundle: Bundle, folder: Path) -> None:
    """Hard-link a bundle's files into ``folder``, or copy them if the file system cannot.

    Once the old folder is deleted, the links are the only names of the files.
    """
    bundle.check_quickly()
    for relative in bundle.manifest.files:
        if relative in DOCUMENTS and not bundle.is_edited(relative):
            continue  # written again, for all graphs
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(bundle.file(relative).resolve())  # symbolic links may be relative
        except OSError:  # a file system without hard links
            shutil.copyfile(bundle.file(relative), target)


def add_graph(
    folder: Path,
    manifest: Manifest,
    graph: Graph,
    hashes: Mapping[str, str],
    source: WeightSource,
) -> None:
    """Add a written graph to the manifest and to the files that describe the bundle.

    Args:
        folder: the staged bundle.
        manifest: describes what was there before; changed in place.
        graph: the new graph.
        hashes: SHA-256 of its files, by relative path.
        source: the weights.
    """
    manifest.graphs = [*manifest.graphs, graph]
    if graph.runtime == "onnx":
        graphs = [item for item in manifest.graphs if item.runtime == "onnx"]
        if graph.target == "web":
            write_transformers_js_config(folder, graphs)
        # onnxruntime-genai does not feed num_logits_to_keep.
        openable = [item for item in graphs if not item.requires_num_logits]
        if openable:
            generation = generation_config_to_json(source.config, source.generation_config())
            write_genai_config(folder, source.config, default_graph(openable), generation)
    unchanged = known_hashes(manifest, GENAI_CONFIG, CONFIG_NAME)
    write_manifest(folder, manifest, unchanged | dict(hashes))


def add_proof(folder: Path, manifest: Manifest, graph: Graph, proof: str) -> Graph:
    """Add a graph's parity report to ``parity.json``; return the graph marked as verified.

    Args:
        folder: the staged bundle.
        manifest: ends with the graph; changed in place.
        graph: the graph.
        proof: its report as JSON.
    """
    reports = read_proofs(folder) | {graph.path: json.loads(proof)}
    write_text_atomically(folder / PARITY, json.dumps(reports, indent=1) + "\n")
    verified = replace(graph, verified=True)
    manifest.graphs = [verified if item == graph else item for item in manifest.graphs]
    write_manifest(folder, manifest, known_hashes(manifest, PARITY))
    return verified


def known_hashes(manifest: Manifest, *changed: str) -> dict[str, str]:
    """Return the hashes of a bundle's files except those at the relative paths ``changed``."""
    return {name: record.sha256 for name, record in manifest.files.items() if name not in changed}


def tokenizer_of(source: WeightSource) -> Tokenizer | None:
    """Return the tokenizer of the weights, if any."""
    file = source.tokenizer_file()
    return None if file is None else load_tokenizer(file)


def require_space(output: Path, size_bytes: int) -> None:
    """Check that the disk has room for an export, before writing anything.

    Raises:
        Gemma3ExportError: there is too little space.
    """
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise Gemma3ExportError(
            f"the export needs about {size_bytes / 1e9:.2f} GB, but {folder} has only "
            f"{free / 1e9:.2f} GB free; free some space or choose another output"
        )


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that made the bundle."""
    names = ("torch", "onnx", "onnx-ir", "onnxscript")
    return {"gemma3-export": __version__} | {
        name: importlib.metadata.version(name) for name in names
    }


def half_precision(dtype: torch.dtype, *, holds_residual: bool) -> HalfPrecision | None:
    """Describe the half precision of a graph in ``dtype``, None for float32."""
    return (
        HalfPrecision(dtype=dtype, holds_residual=holds_residual) if dtype.itemsize == 2 else None
    )
