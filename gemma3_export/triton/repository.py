"""Write a bundle into a Triton model repository, and find it again in the server.

REPO/NAME/config.pbtxt
REPO/NAME/1/model.py       imports gemma3_export.triton.backend
REPO/NAME/1/bundle.json    where the bundle is, and the hash of its manifest
REPO/NAME/1/bundle/        the bundle, unless the server finds it elsewhere
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma3_export import __version__
from gemma3_export.bundle import MANIFEST, PARITY, Bundle
from gemma3_export.bundle.manifest import Graph, sha256_of
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, to_path
from gemma3_export.limits import shown
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.records import read_record
from gemma3_export.staging import reject_existing, staged_directory
from gemma3_export.triton.model_config import TritonOptions, config_text

__all__ = ["open_recorded_bundle", "write_repository"]

VERSION_FOLDER = "1"
BUNDLE_FOLDER = "bundle"
RECORD = "bundle.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MODEL_PY = '''\
"""Run a bundle in Triton's Python backend; written by `gemma3-export triton`."""

from gemma3_export.triton.backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleRecord:
    """What ``bundle.json`` says.

    Args:
        path: of the bundle, relative to the record or absolute.
        manifest_sha256: of the bundle's manifest, which has the hashes of its other files.
        gemma3_export: version that wrote the record.
    """

    path: str
    manifest_sha256: str
    gemma3_export: str


def write_repository(
    bundle: Bundle,
    repository: Path | str,
    name: str,
    options: TritonOptions | None = None,
    *,
    device: str = "cpu",
    bundle_at: Path | str | None = None,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> Path:
    """Write a bundle as the model ``name`` of a model repository; other models stay as they are.

    Args:
        bundle: every file of it is checked against the manifest.
        repository: the folder of models; it is created if it is missing.
        name: of the model.
        options: settings of the engine.
        device: ``cpu``; ``cuda`` for one instance on each GPU; or ``cuda:N``.
        bundle_at: the absolute path at which the server will find the bundle; None copies it.
        force: replace a model that this function wrote.
        progress: called with the stage and the bytes that are done.

    Returns:
        The folder of the model.

    Raises:
        InputError: an argument is invalid, the bundle is damaged or has no such variant, or
            something is in the way.
        Gemma3ExportError: writing failed.
    """
    options = options or TritonOptions()
    if not NAME.fullmatch(name):
        raise InputError(
            f"the model name is {shown(name)}; it must have 1 to 128 letters, digits, dots, dashes "
            "and underscores, and begin with a letter or digit"
        )
    if bundle_at is not None and not Path(bundle_at).is_absolute():
        raise InputError(
            f"the server's path of the bundle is {shown(str(bundle_at))}; it must be absolute"
        )
    chosen = bundle.with_variant(options.variant)
    target = to_path(repository, "the model repository") / name
    if target.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"{target} is inside the bundle {bundle.path}; choose another repository")
    config = config_text(name, device, options)
    reject_existing(target, force=force)
    chosen.check_files(progress=progress)
    with staged_directory(target, force=force) as staged:
        version = staged / VERSION_FOLDER
        version.mkdir()
        record = BundleRecord(
            path=BUNDLE_FOLDER if bundle_at is None else str(bundle_at),
            manifest_sha256=sha256_of(bundle.path / MANIFEST),
            gemma3_export=__version__,
        )
        if bundle_at is None:
            _copy(chosen, version / BUNDLE_FOLDER, progress)
        (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
        text = json.dumps(asdict(record), indent=2) + "\n"
        (version / RECORD).write_text(text, encoding="utf-8")
        (staged / "config.pbtxt").write_text(config, encoding="utf-8")
    return target


def open_recorded_bundle(version_folder: Path, variant: str | None = None) -> Bundle:
    """Return the bundle that belongs to a model in a repository.

    Raises:
        InputError: it is missing, or is not the bundle that the repository was written for.
    """
    remedy = "write the model again with `gemma3-export triton`"
    file = version_folder / RECORD
    record = read_record(file, BundleRecord, remedy=remedy)
    path = version_folder / record.path  # an absolute path replaces the folder
    if not is_file(path / MANIFEST):
        raise InputError(f"there is no bundle at {path}, where {file} says; mount it, or {remedy}")
    if sha256_of(path / MANIFEST) != record.manifest_sha256:
        raise InputError(
            f"{path} is not the bundle that {version_folder.parent} was written for: its manifest "
            f"has another hash; mount the right one, or {remedy}"
        )
    return Bundle(path, variant)


def _copy(bundle: Bundle, folder: Path, progress: Progress) -> None:
    """Copy the files of a bundle, without those of variants other than the chosen one."""
    graphs = bundle.manifest.graphs
    chosen = [graph for graph in graphs if bundle.variant in (None, graph.variant)]
    needless = _files(graphs) - _files(chosen)
    names = [name for name in (*bundle.manifest.files, PARITY, MANIFEST) if name not in needless]
    files = {name: bundle.file(name) for name in names if is_file(bundle.file(name))}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[name], place)
        done += size
        progress("copying the bundle", done, total)


def _files(graphs: Iterable[Graph]) -> set[str]:
    return set().union(*(graph.own_files for graph in graphs))
