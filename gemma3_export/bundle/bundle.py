"""The bundle: one self-contained folder that describes itself.

    config.json generation_config.json tokenizer.json tokenizer_config.json
    onnx/model.onnx  onnx/model.onnx_data  onnx/model_windowed.onnx
    torchscript/model.ts  pt2/model.pt2
    manifest.json    format version, graphs, signature, origin and SHA-256 of every file
    parity.json      the parity report of each verified graph, by runtime

Reading a bundle needs neither torch nor ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from gemma3_export.bundle.manifest import FileRecord, Graph, read_manifest, sha256_of
from gemma3_export.bundle.signature import Signature
from gemma3_export.config import CONFIG_NAME, Gemma3Config, load_config
from gemma3_export.dtypes import DEFAULT_MAX_KLD
from gemma3_export.errors import InputError

__all__ = ["Bundle"]


class Bundle:
    """An exported model on disk.

    Raises:
        InputError: the folder is not a bundle, or is damaged or of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.config: Gemma3Config = load_config(path / CONFIG_NAME)

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

    def check_files(self, only: Sequence[str] | None = None) -> None:
        """Compare sizes and SHA-256 hashes with the manifest.

        Args:
            only: relative paths to check; None means all.

        Raises:
            InputError: files are missing or differ; the message lists all of them.
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
                f"{self.path} differs from its manifest: {'; '.join(problems)}; "
                "copy the bundle again or export it again"
            )

    def check_sizes(self) -> None:
        """Check that every file exists and has its size: the cheap part of :meth:`check_files`.

        Raises:
            InputError: files are missing or have another size; the message lists all of them.
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
                f"{self.path} is damaged: {'; '.join(problems)}; "
                "copy the bundle again or export it again"
            )


def _file_problem(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != record.size_bytes:
        return f"{size} bytes instead of {record.size_bytes}"
    if sha256_of(path) != record.sha256:
        return "SHA-256 differs"
    return None
