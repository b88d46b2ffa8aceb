"""The bundle: one self-contained folder that describes itself.

    config.json generation_config.json tokenizer.json tokenizer_config.json
    genai_config.json    for onnxruntime-genai, with an ONNX graph
    onnx/model.onnx  onnx/model.onnx_data  onnx/model_windowed.onnx
    onnx/model_quantized.onnx ...    other variants: see variants.py
    torchscript/model.ts  pt2/model.pt2
    manifest.json    format version, graphs, signature, origin and hashes of every file
    parity.json      the parity report of each verified graph, by the graph's path
    parity.svg       a plot of these reports
    README.md .gitattributes NOTICE    model card, Git LFS patterns and license notice: documents

Reading a bundle needs neither torch nor ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath

from gemma3_export.bundle.manifest import (
    DOCUMENTS,
    FULLY_HASHED_BYTES,
    FileRecord,
    Graph,
    default_graph,
    read_manifest,
    sample_sha256_of,
    sha256_of,
)
from gemma3_export.bundle.signature import Signature
from gemma3_export.config import CONFIG_NAME, Gemma3Config, load_config
from gemma3_export.dtypes import DEFAULT_MAX_KLD
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, to_path
from gemma3_export.progress import Progress, ignore_progress

__all__ = ["Bundle"]


class Bundle:
    """An exported model on disk, seen through one of its variants.

    Args:
        path: the folder.
        variant: which graph to use of a runtime that has several, such as ``int8``; None is the
            default: see :func:`gemma3_export.bundle.manifest.default_graph`.

    Raises:
        InputError: the folder is not a bundle, is damaged or of a newer version, or has no such
            variant.
    """

    def __init__(self, path: Path | str, variant: str | None = None) -> None:
        self.path = to_path(path, "the bundle")
        self.manifest = read_manifest(self.path)
        self.variant = variant
        if variant is not None and variant not in self.variants():
            raise InputError(
                f"{self.path} has no variant {variant!r:.40}; choose one of "
                f"{', '.join(self.variants())}"
            )
        self.config: Gemma3Config = load_config(self.path / CONFIG_NAME)

    def graph(self, runtime: str) -> Graph:
        """Return the graph for ``runtime``, of this variant.

        Raises:
            InputError: the bundle has none.
        """
        found = self._graphs(runtime)
        if found:
            return default_graph(found)
        present = ", ".join(f"{graph.runtime} {graph.variant}" for graph in self.manifest.graphs)
        wanted = "" if self.variant is None else f" of variant {self.variant}"
        option = "" if self.variant is None else f" --dtype {self.variant.partition('-')[0]}"
        raise InputError(
            f"{self.path} has no {runtime} graph{wanted} (it has: {present or 'none'}); "
            f"export one with `gemma3-export {runtime}{option}`"
        )

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes that have a graph of this variant, in the order of their export."""
        graphs = (g for g in self.manifest.graphs if self.variant in (None, g.variant))
        return tuple(dict.fromkeys(graph.runtime for graph in graphs))

    @property
    def first_graph(self) -> Graph:
        """The graph of the first runtime that has one of this variant.

        Raises:
            InputError: the bundle has no graph at all.
        """
        return self.graph(next(iter(self.runtimes), "onnx"))

    def variants(self, runtime: str | None = None) -> tuple[str, ...]:
        """Return the variants that ``runtime`` has graphs of, or that any runtime has."""
        graphs = (g for g in self.manifest.graphs if runtime in (None, g.runtime))
        return tuple(dict.fromkeys(graph.variant for graph in graphs))

    def with_variant(self, variant: str | None) -> Bundle:
        """Return the same bundle seen through another variant; None keeps this one.

        Raises:
            InputError: it has no such variant.
        """
        return self if variant in (None, self.variant) else Bundle(self.path, variant)

    def require_vacant(self, runtime: str, variant: str, path: str | None = None) -> None:
        """Check that a graph can be added without replacing another one.

        Args:
            runtime: of the new graph.
            variant: of the new graph.
            path: relative, of the new graph; None checks only the variant.

        Raises:
            InputError: the bundle has the graph, or uses its file name for another one.
        """
        remedy = "choose another output, or pass --force to replace the whole bundle"
        if variant in self.variants(runtime):
            raise InputError(
                f"{self.path} exists and already has {variant} for {runtime}; {remedy}"
            )
        for graph in self.manifest.graphs:
            if path in graph.own_files:  # before format 3, every variant was in model.onnx
                raise InputError(
                    f"{self.path} was made by an older version, which put its {graph.variant} "
                    f"graph in {path}, so {variant} cannot be added; {remedy}"
                )

    def is_quantized(self, runtime: str) -> bool:
        """Return whether the graph for ``runtime`` stores quantized weights."""
        graphs = self._graphs(runtime)
        recipes = default_graph(graphs).weights.values() if graphs else ()
        return any(recipe.blocks is not None for recipe in recipes)

    def max_kld(self, runtime: str) -> float:
        """Return the divergence budget of the graph for ``runtime``, in mean nats per token."""
        graphs = self._graphs(runtime)
        return default_graph(graphs).max_kld if graphs else DEFAULT_MAX_KLD

    def _graphs(self, runtime: str) -> list[Graph]:
        return [
            graph
            for graph in self.manifest.graphs
            if graph.runtime == runtime and self.variant in (None, graph.variant)
        ]

    def signature(self, graph: Graph, *, is_windowed: bool = False) -> Signature:
        """Return the inputs and outputs of ``graph``, or of its sliding-window version."""
        return Signature.of(
            self.config,
            cache_dtype=graph.cache_dtype,
            is_windowed=is_windowed,
            is_screened=is_windowed and graph.is_screened,
            requires_num_logits=graph.requires_num_logits,
        )

    def file_bytes(self, relative: str) -> int:
        """Return the size of one file, 0 if it is not in the bundle."""
        record = self.manifest.files.get(relative)
        return record.size_bytes if record else 0

    def file(self, relative: str) -> Path:
        """Return the path of one file of the bundle."""
        return self.path.joinpath(*PurePosixPath(relative).parts)

    def is_edited(self, document: str) -> bool:
        """Return whether somebody changed a document since it was written; False if it is gone."""
        record, file = self.manifest.files.get(document), self.file(document)
        return is_file(file) and (record is None or sha256_of(file) != record.sha256)

    def check_files(
        self, only: Collection[str] | None = None, progress: Progress = ignore_progress
    ) -> None:
        """Compare sizes and SHA-256 hashes with the manifest, except those of documents.

        The files of variants other than the chosen one are left out, and may be missing.

        Args:
            only: relative paths to check; None means all.
            progress: called with the stage and the bytes that are hashed.

        Raises:
            InputError: files are missing or differ; the message lists all of them.
        """
        skipped = self._files_of_others()
        names = [name for name in self.manifest.files if name not in skipped]
        self._check(dict.fromkeys(names if only is None else only, True), progress)

    def check_quickly(
        self,
        *,
        only_for: Graph | None = None,
        in_full: Collection[str] = (),
        except_for: Collection[str] = (),
    ) -> None:
        """Compare files with the manifest as far as that costs milliseconds.

        Sizes are compared, small files are hashed in full, and of larger ones a sample is. An edit
        of a large file that keeps its size and misses the sample goes unnoticed; bundles of format
        1 have no samples, so there only the sizes of large files are compared.

        Args:
            only_for: leave out the files of all other graphs, which may then be missing; None
                leaves out those of other variants, if one was chosen.
            in_full: relative paths of files to hash in full whatever their size.
            except_for: relative paths of files not to check.

        Raises:
            InputError: files are missing or differ; the message lists all of them.
        """
        skipped = {*except_for, *self._files_of_others(only_for)}
        self._check(
            {
                name: name in in_full or record.size_bytes <= FULLY_HASHED_BYTES
                for name, record in self.manifest.files.items()
                if name not in skipped
            }
        )

    def _files_of_others(self, chosen: Graph | None = None) -> set[str]:
        """Return the files of graphs other than ``chosen``, or of other variants."""
        others = [
            graph.own_files
            for graph in self.manifest.graphs
            if (self.variant not in (None, graph.variant) if chosen is None else graph != chosen)
        ]
        return set().union(*others)

    def _check(self, in_full: Mapping[str, bool], progress: Progress = ignore_progress) -> None:
        """Check files, and those with a true value in full."""
        records = {
            name: self.manifest.files[name]
            for name in in_full
            if name in self.manifest.files and name not in DOCUMENTS
        }
        total = sum(record.size_bytes for name, record in records.items() if in_full[name])
        done = 0

        def advance(size_bytes: int) -> None:
            nonlocal done
            done += size_bytes
            progress("hashing the bundle", min(done, total), total)

        found = {
            name: _file_problem(self.file(name), record, advance if in_full[name] else None)
            for name, record in records.items()
        }
        if problems := [f"{name}: {problem}" for name, problem in found.items() if problem]:
            raise InputError(
                f"{self.path} differs from its manifest: {'; '.join(problems)}; "
                "copy the bundle again or export it again"
            )


def _file_problem(
    path: Path, record: FileRecord, on_bytes: Callable[[int], None] | None
) -> str | None:
    """Return what differs, or None; the file is hashed in full if ``on_bytes`` is given."""
    if not is_file(path):
        return "missing"
    size = path.stat().st_size
    if size != record.size_bytes:
        return f"{size} bytes instead of {record.size_bytes}"
    if on_bytes is not None:
        return "SHA-256 differs" if sha256_of(path, on_bytes) != record.sha256 else None
    if record.sample_sha256 is not None and sample_sha256_of(path) != record.sample_sha256:
        return "SHA-256 of a sample differs"
    return None
