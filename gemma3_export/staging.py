"""Write files and folders atomically: write to a temporary sibling, then rename.

After a failure (a full disk, Ctrl-C, a failed check), the target is either unchanged or complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma3_export.errors import Gemma3ExportError, InputError

__all__ = ["check_disk_space", "staged_directory", "write_text_atomically"]

# Every folder that a command creates contains one of these files: a bundle, a Hugging Face folder,
# a training run, a token folder, a benchmark peer's model. --force replaces no other folder.
MARKER_FILES = ("manifest.json", "config.json", "meta.json", "peer.json")


@contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder, and rename it to ``target`` if the block succeeds.

    Args:
        target: the folder to create.
        force: replace an existing folder.

    Raises:
        InputError: ``target`` must not be replaced; see :func:`refuse_existing`.
        Gemma3ExportError: writing failed, for example because the disk is full.
    """
    target = target.absolute()
    refuse_existing(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"cannot create a folder in {target.parent}: {error}; choose another output"
        ) from error
    try:
        staging.chmod(0o755)  # mkdtemp creates it with 0o700, but a bundle is meant to be shared
        yield staging
        _swap(staging, target)
    except OSError as error:
        raise Gemma3ExportError(
            f"writing {target} failed, and no partial output is left: {error}; "
            "free some disk space or choose another output"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise an error if ``target`` must not be created or replaced.

    Raises:
        InputError: ``target`` is not a folder, is not empty and ``force`` is false, contains no
            file of this program, or contains the current folder, which would be renamed away.
    """
    if Path.cwd().is_relative_to(target.resolve()):
        raise InputError(
            f"{target} is or contains the current folder, which cannot be replaced; "
            "choose an output that does not exist yet"
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a folder; choose another output")
    if not target.exists() or not (names := sorted(path.name for path in target.iterdir())):
        return
    if not set(names) & set(MARKER_FILES):
        raise InputError(
            f"{target} exists and was not created by this program (it contains "
            f"{', '.join(names[:3])}), so it is not replaced even with --force; choose another "
            "output"
        )
    if not force:
        raise InputError(f"{target} exists and is not empty; pass --force to replace it")


def check_disk_space(path: Path, size_bytes: int) -> None:
    """Check that a file of ``size_bytes`` can be written, by allocating it temporarily.

    This is for writers that leave no way to clean up: torch aborts the process if an archive does
    not fit on the disk.

    Raises:
        OSError: the disk is full, or a quota or limit is exceeded.
    """
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    finally:
        path.unlink(missing_ok=True)


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        target.rename(old / "bundle")
        staging.rename(target)
    except BaseException:
        if not target.exists() and (old / "bundle").exists():
            (old / "bundle").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, replacing the file atomically.

    Raises:
        Gemma3ExportError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise Gemma3ExportError(
            f"cannot write {path}: {error}; free some disk space or check the permissions"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
