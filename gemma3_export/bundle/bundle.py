"""The bundle: one self-contained folder that describes itself.

    config.json generation_config.json tokenizer.json tokenizer_config.json
    genai_config.json    for onnxruntime-genai, with an ONNX graph
    onnx/model.onnx  onnx/model.onnx_data  onnx/model_windowed.onnx
    torchscript/model.ts  pt2/model.pt2
    manifest.json    format version, graphs, signature, origin and hashes of every file
    parity.json      the parity report of each verified graph, by runtime

Reading a bundle needs neither torch nor ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from gemma3_export.bundle.manifest import (
    FULLY_HASHED_BYTES,
    FileRecord,
    Graph,
    read_manifest,
    sample_sha256_of,
    sha256_of,
)
from gemma3_export.bundle.signature import Signature
from gemma3_export.config import CONFIG_NAME, Gemma3Config, load_config
from gemma3_export.dtypes import DEFAULT_MAX_KLD
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, to_path

__all__ = ["Bundle"]


class Bundle:
    """An exported model on disk.

    Raises:
        InputError: the folder is not a bundle, or is damaged or of a newer version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = to_path(path, "the bundle")
        self.manifest = read_manifest(self.path)
        self.config: Gemma3Config = load_config(self.path / CONFIG_NAME)

    def graph(self, runtime: str) -> Graph:
        """Return the graph for ``runtime``.

        Raises:
            InputError: the bundle has none.
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
        """Return whether the graph for ``runtime`` stores quantized weights."""
        return any(
            recipe.blocks is not None
            for graph in self.manifest.graphs
            if graph.runtime == runtime
            for recipe in graph.weights.values()
        )

    def max_kld(self, runtime: str) -> float:
        """Return the divergence budget of the graph for ``runtime``, in mean nats per token."""
        budgets = [graph.max_kld for graph in self.manifest.graphs if graph.runtime == runtime]
        return budgets[0] if budgets else DEFAULT_MAX_KLD

    def signature(self, graph: Graph, *, is_windowed: bool = False) -> Signature:
        """Return the inputs and outputs of ``graph``, or of its sliding-window version."""
        return Signature.of(
            self.config,
            cache_dtype=graph.cache_dtype,
            is_windowed=is_windowed,
            is_screened=is_windowed and graph.is_screened,
        )

    def file_bytes(self, relative: str) -> int:
        """Return the size of one file, 0 if it is not in the bundle."""
        record = self.manifest.files.get(relative)
        return record.size_bytes if record else 0

    def file(self, relative: str) -> Path:
        """Return the path of one file of the bundle."""
        return self.path.joinpath(*PurePosixPath(relative).parts)

    def check_files(self, only: Collection[str] | None = None) -> None:
        """Compare sizes and SHA-256 hashes with the manifest.

        Args:
            only: relative paths to check; None means all.

        Raises:
            InputError: files are missing or differ; the message lists all of them.
        """
        names = self.manifest.files if only is None else only
        self._check(dict.fromkeys(names, True))

    def check_quickly(
        self, *, in_full: Collection[str] = (), except_for: Collection[str] = ()
    ) -> None:
        """Compare files with the manifest as far as that costs milliseconds.

        Sizes are compared, small files are hashed in full, and of larger ones a sample is. An edit
        of a large file that keeps its size and misses the sample goes unnoticed; bundles of format
        1 have no samples, so there only the sizes of large files are compared.

        Args:
            in_full: relative paths of files to hash in full whatever their size.
            except_for: relative paths of files not to check.

        Raises:
            InputError: files are missing or differ; the message lists all of them.
        """
        self._check(
            {
                name: name in in_full or record.size_bytes <= FULLY_HASHED_BYTES
                for name, record in self.manifest.files.items()
                if name not in except_for
            }
        )

    def _check(self, in_full: Mapping[str, bool]) -> None:
        """Check files, and those with a true value in full."""
        found = {
            name: _file_problem(self.file(name), self.manifest.files[name], in_full=is_full)
            for name, is_full in in_full.items()
            if name in self.manifest.files
        }
        if problems := [f"{name}: {problem}" for name, problem in found.items() if problem]:
            raise InputError(
                f"{self.path} differs from its manifest: {'; '.join(problems)}; "
                "copy the bundle again or export it again"
            )


def _file_problem(path: Path, record: FileRecord, *, in_full: bool) -> str | None:
    if not is_file(path):
        return "missing"
    size = path.stat().st_size
    if size != record.size_bytes:
        return f"{size} bytes instead of {record.size_bytes}"
    if in_full:
        return "SHA-256 differs" if sha256_of(path) != record.sha256 else None
    if record.sample_sha256 is not None and sample_sha256_of(path) != record.sample_sha256:
        return "SHA-256 of a sample differs"
    return None
