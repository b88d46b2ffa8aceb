"""All-or-nothing output: write to a temporary sibling, then rename.

Whatever goes wrong half-way (a full disk, Ctrl-C, a failed check), the target is either what it was
before or complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma3_export.errors import Gemma3ExportError, InputError

__all__ = ["require_room", "staged_directory", "write_text_atomically"]

# What every folder that a command creates has: a bundle, a Hugging Face folder or a run, tokens, a
# peer's model. Without one of them a folder is somebody's own, and --force does not delete it.
OURS = ("manifest.json", "config.json", "meta.json", "peer.json")


@contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes ``target`` when the block ends without an error.

    Args:
        target: the folder to create.
        force: replace an existing folder instead of refusing.

    Raises:
        InputError: ``target`` exists and ``force`` is false, or it is not a folder.
        Gemma3ExportError: the file system refused (full disk, no permission).
    """
    target = target.absolute()
    refuse_existing(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write beside {target}: {error}") from error
    try:
        staging.chmod(0o755)  # mkdtemp makes it private; a bundle is meant to be shared
        yield staging
        _swap(staging, target)
    except OSError as error:
        raise Gemma3ExportError(
            f"writing {target} failed and nothing was kept: {error}; "
            "free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Complain early about a target that must not be overwritten.

    Raises:
        InputError: see :func:`staged_directory`; or it is the current folder or holds it, which
            would be renamed away under the process and the shell that started it; or nothing in
            it says that this program made it.
    """
    if Path.cwd().is_relative_to(target.resolve()):
        raise InputError(
            f"{target} is the current folder or holds it, and an output is moved into place as a "
            "whole; name a folder that does not exist yet"
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a folder; choose another output")
    if not target.exists() or not (names := sorted(path.name for path in target.iterdir())):
        return
    if not set(names) & set(OURS):
        raise InputError(
            f"{target} exists and nothing in it ({', '.join(names[:3])}) says that this program "
            "made it, so it is not replaced, with --force either; choose another output"
        )
    if not force:
        raise InputError(f"{target} exists and is not empty; pass --force to replace it")


def require_room(path: Path, size_bytes: int) -> None:
    """Find out whether a file can be written, by reserving its bytes for a moment.

    For writers that leave no way to clean up: torch ends the process when an archive does not fit.

    Raises:
        OSError: the disk is full, or a quota or limit is in the way.
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
    """Replace ``path`` by ``text`` in one step.

    Raises:
        Gemma3ExportError: the file system refused.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise Gemma3ExportError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
