"""Find and open graphs that another tool exported, so that they can be compared with weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma3_export.bundle import MANIFEST
from gemma3_export.bundle.manifest import sha256_of
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, to_path

if TYPE_CHECKING:
    from gemma3_export.device import CudaOptions
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.runtimes.onnx.third_party import ThirdPartyRuntime

__all__ = ["file_hashes", "find_graph", "open_graph"]

SUFFIX = ".onnx"
USUAL_NAME = "model.onnx"  # of the graph to run, where a folder has several


def find_graph(path: Path | str) -> Path | None:
    """Return the graph that ``path`` names: a ``.onnx`` file, or a folder with one and no manifest.

    None if ``path`` is a bundle, or has no graph.

    Raises:
        InputError: the folder has several graphs.
    """
    path = to_path(path, "the bundle")
    if path.suffix == SUFFIX and not path.is_dir():
        return path
    if is_file(path / MANIFEST) or not path.is_dir():
        return None
    found = sorted([*path.glob(f"*{SUFFIX}"), *path.glob(f"onnx/*{SUFFIX}")])
    usual = [file for file in found if file.name == USUAL_NAME]
    if len(found) < 2 or len(usual) == 1:
        return next(iter(usual or found), None)
    names = ", ".join(file.relative_to(path).as_posix() for file in found[:6])
    raise InputError(f"{path} has several graphs ({names}); give the path of one of them")


def open_graph(
    path: Path,
    source: WeightSource,
    *,
    device: str,
    threads: int | None,
    cuda: CudaOptions | None,
) -> ThirdPartyRuntime:
    """Open the graph at ``path`` as the model of ``source``.

    Raises:
        InputError: it is not a graph of this model that can be fed.
        UnavailableError: a package or the device is missing.
    """
    from gemma3_export.runtimes.onnx.third_party import ThirdPartyRuntime

    return ThirdPartyRuntime(path, source.config, device=device, threads=threads, cuda=cuda)


def file_hashes(runtime: ThirdPartyRuntime) -> dict[str, str]:
    """Return the SHA-256 of the graph and of its external data, by name, for the report."""
    return {file.name: sha256_of(file) for file in (runtime.file.path, *runtime.file.data_files)}
