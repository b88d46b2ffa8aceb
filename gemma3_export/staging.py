"""Write files and folders atomically: write to a temporary sibling, then rename.

After a failure (a full disk, Ctrl-C, a failed check), the target is either unchanged or complete.
One process at a time writes a folder, whichever command it runs; another one is told which process
is in the way. What a killed process left behind is removed by the next one that writes to the same
place.

    .NAME.partial/owner     locked and held by the process that writes NAME
    .NAME.partial/content   becomes NAME
    .NAME.partial/replaced  what NAME was, for the moment of an exchange that the system cannot do
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import gc
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import is_file, open_regular, to_path
from gemma3_export.locks import exclusive
from gemma3_export.records import read_json
from gemma3_export.signals import uninterrupted

__all__ = [
    "DOCUMENTS",
    "check_disk_space",
    "check_writable",
    "foreign_files",
    "publish",
    "reject_existing",
    "sole_writer",
    "staged_directory",
    "write_text_atomically",
]

# What the folders that commands create contain: a marker, and nothing but files of these names.
# --force replaces no other folder.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)
RUN_FILES = ("training.json", "log.csv", "loss.png", "checkpoints/*", "tensorboard/*", ".lock")
OWN_FOLDERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("meta.json", ("meta.json", "*.bin", "tokenizer.json", "tokenizer_config.json")),
    ("peer.json", ("*",)),
    ("1/bundle.json", ("config.pbtxt", "1/model.py", "1/bundle.json", "1/bundle/*")),
    ("training.json", MODEL_FILES + RUN_FILES),
    ("config.json", MODEL_FILES),
)
PARTIAL_FILES = (".*.partial", "*/.*.partial")  # of a process that was killed while writing
MANIFEST = "manifest.json"
# The files of a bundle that readers may edit: model card, Git LFS patterns and license notice.
DOCUMENTS = ("README.md", ".gitattributes", "NOTICE")
RENAME_EXCHANGE = 2  # of renameat2(2)
AT_FDCWD = -100
logger = logging.getLogger(__name__)


@contextmanager
def staged_directory(
    target: Path | str, *, force: bool = False, keeps: Collection[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder, and rename it to ``target`` if the block succeeds.

    Args:
        target: the folder to create. An empty mount point is filled instead, manifest last.
        force: replace an existing folder that this program made.
        keeps: documents that the new content has from the old one, so they may have been edited.

    Raises:
        InputError: ``target`` must not be replaced, also because files appeared in it meanwhile
            (see :func:`reject_existing`); or another process is writing it.
        Gemma3ExportError: writing failed, for example because the disk is full.
    """
    target = to_path(target, "the output").absolute()
    reject_existing(target, force=force, keeps=keeps)
    with sole_writer(target, f"writing {target}") as place:
        content = place / "content"
        try:
            content.mkdir()
            yield content
            reject_existing(target, force=force, keeps=keeps)
            publish(content, target)
        except OSError as error:
            raise Gemma3ExportError(
                f"writing {target} failed, and no partial output is left: {error}; "
                "free some disk space or choose another output"
            ) from error


def reject_existing(target: Path, *, force: bool, keeps: Collection[str] = ()) -> None:
    """Raise an error if ``target`` must not be created or replaced.

    Args:
        target: the folder to create.
        force: whether a folder that this program made may be replaced.
        keeps: see :func:`staged_directory`.

    Raises:
        InputError: ``target`` is not a folder, is not empty and ``force`` is false, contains files
            that this program did not write, is a mount point that is not empty, or contains the
            current folder, which would be renamed away.
    """
    if _current_folder().is_relative_to(target.resolve()):
        raise InputError(
            f"{target} is or contains the current folder, which cannot be replaced; "
            "choose an output that does not exist yet"
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a folder; choose another output")
    if not target.exists():
        return
    place = _place_of(target).name  # inside a mount point
    names = sorted(path.name for path in target.iterdir() if path.name != place)
    if not names:
        return
    if foreign := [name for name in foreign_files(target) if name not in keeps]:
        raise InputError(
            f"{target} exists and was not created by this program, or was edited (it contains "
            f"{', '.join(foreign[:3])}), so it is not replaced even with --force; choose "
            "another output"
        )
    if not force:
        raise InputError(f"{target} exists and is not empty; pass --force to replace it")
    if os.path.ismount(target):
        raise InputError(
            f"{target} is a mount point and is not empty; empty it, or choose a folder inside it"
        )


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise InputError(
            "the current folder has been deleted; change to one that exists and try again"
        ) from error


def foreign_files(folder: Path) -> list[str]:
    """Return the files of ``folder`` that no command of this program writes.

    A document of a bundle that somebody edited is one of them.
    """
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    place = _place_of(folder).name  # inside a mount point
    found = [file.as_posix() for file in files if file.parts[0] != place]
    if MANIFEST in found:
        with suppress(InputError, TypeError, KeyError):
            manifest = read_json(folder / MANIFEST, remedy="delete it")
            if "format_version" in manifest:
                own = {MANIFEST, "parity.json", *manifest["files"]}
                edited = [
                    name
                    for name in DOCUMENTS
                    if name in found and name in own and _is_edited(folder, name, manifest)
                ]
                return sorted([name for name in found if name not in own] + edited)
    for marker, patterns in OWN_FOLDERS:
        if marker in found:
            return sorted(
                name
                for name in found
                if not any(
                    fnmatch.fnmatchcase(name, pattern) for pattern in (*patterns, *PARTIAL_FILES)
                )
            )
    return sorted(found) or [folder.name]


def _is_edited(folder: Path, name: str, manifest: dict[str, Any]) -> bool:
    with open_regular(folder / name) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return bool(found != manifest["files"][name]["sha256"])


def _place_of(target: Path) -> Path:
    """Return the folder beside ``target``, or in it, where its content is prepared."""
    return (target if os.path.ismount(target) else target.parent) / f".{target.name}.partial"


@contextmanager
def sole_writer(target: Path, what: str) -> Iterator[Path]:
    """Let one process at a time write ``target``, whichever command it runs.

    Args:
        target: the output.
        what: the work, such as ``training into run``.

    Yields:
        The place where content for ``target`` may be prepared; it is removed at the end.

    Raises:
        InputError: another process writes it, or the place cannot be created.
    """
    target = target.absolute()
    place = _place_of(target)
    try:
        with exclusive(place / "owner", what):
            _recover(place, target)
            try:
                yield place
            finally:
                with uninterrupted():
                    _clear(place, target)
    finally:
        with uninterrupted(), suppress(OSError):  # another process may have taken the place
            place.rmdir()


def _clear(place: Path, target: Path) -> None:
    """Remove what is left in ``place``; bring back what was to be replaced, but was not."""
    replaced = place / "replaced"
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for left in (place / "content", replaced):
        shutil.rmtree(left, ignore_errors=True)


def _recover(place: Path, target: Path) -> None:
    """Undo what a process that was killed left in ``place``."""
    replaced, content = place / "replaced", place / "content"
    if replaced.exists() and not target.exists():
        replaced.rename(target)
        logger.warning("restored %s, which an interrupted run was replacing", target)
    for left in (replaced, content):
        if left.exists():
            size = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
            shutil.rmtree(left)
            logger.warning(
                "removed %.1f MB of partial output that an interrupted run left beside %s",
                size / 1e6,
                target,
            )


def publish(content: Path, target: Path) -> None:
    """Rename ``content`` to ``target``, which does not exist, is empty, or may be replaced.

    A plain rename replaces an empty folder and no other, so that files that appeared meanwhile are
    never lost.

    Raises:
        InputError: files appeared in ``target`` at the last moment.
    """
    if sys.platform == "win32":
        gc.collect()  # closes files in reference cycles: no folder with an open file can be renamed
    try:
        with uninterrupted():
            _publish(content, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(
                f"files appeared in {target} while it was being written, so nothing was "
                "replaced; choose another output"
            ) from error
        raise


def _publish(content: Path, target: Path) -> None:
    has_entries = target.exists() and any(target.iterdir())
    if os.path.ismount(target):
        _fill(content, target)
    elif not has_entries:
        if sys.platform == "win32" and target.exists():
            target.rmdir()  # a rename replaces nothing there
        content.rename(target)
    elif not exchange(content, target):
        target.rename(_place_of(target) / "replaced")
        content.rename(target)


def _fill(content: Path, target: Path) -> None:
    """Move the entries of ``content`` into the mount point ``target``, the manifest last."""
    entries = sorted(content.iterdir(), key=lambda path: path.name == MANIFEST)
    for entry in entries:
        entry.rename(target / entry.name)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def check_disk_space(path: Path, size_bytes: int) -> None:
    """Check that a file of ``size_bytes`` can be written.

    This is for writers that leave no way to clean up: torch aborts the process if an archive does
    not fit on the disk. Linux allocates the file temporarily, which also respects quotas and
    limits; other systems report the free space.

    Raises:
        OSError: the disk is full, or a quota or limit is exceeded.
    """
    if sys.platform != "linux":
        if shutil.disk_usage(path.parent).free < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    finally:
        path.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, replacing the file atomically; keep line ends as is.

    Raises:
        InputError: something is there that is not a regular file, such as a device.
        Gemma3ExportError: the file cannot be written.
    """
    _check_replaceable(path)
    temporary = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="")
        temporary.replace(path)
    except OSError as error:
        raise Gemma3ExportError(
            f"cannot write {path}: {error}; free some disk space or check the permissions"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Check that :func:`write_text_atomically` can write ``path``, before work that takes long.

    Nothing is left behind.

    Raises:
        InputError: it cannot; the message says why.
    """
    _check_replaceable(path)
    parents = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    probe = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose another place for it"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()
        for folder in parents:
            with suppress(OSError):
                folder.rmdir()


def _partial(path: Path) -> Path:
    """Return the temporary sibling of a file; its name is not longer than one may be."""
    return path.with_name(f".{path.name[:60]}.partial")


def _check_replaceable(path: Path) -> None:
    """Reject a folder, and a device such as /dev/stdout, which a rename would replace."""
    if path.exists() and not is_file(path):
        raise InputError(f"{path} exists and is not a regular file; choose another place")
