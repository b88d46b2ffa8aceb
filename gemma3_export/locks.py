"""Let one process at a time work on something, by a lock file that names its owner.

The lock is the system's own, ``flock`` or on Windows a locked byte, so the system frees it if its
owner is killed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma3_export.errors import InputError
from gemma3_export.signals import uninterrupted

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["exclusive"]

# Windows refuses to read a locked byte, so the one that is locked comes after the process id.
LOCKED_BYTE = 1024


@contextmanager
def exclusive(file: Path, what: str) -> Iterator[None]:
    """Hold the lock ``file`` while the block runs.

    Args:
        file: the lock, which contains the process id of its owner and is removed at the end.
        what: the work that the lock protects, such as ``writing out``.

    Raises:
        InputError: another process holds the lock; the message names the process.
    """
    descriptor = None
    try:
        with uninterrupted():  # a signal between the lock and its release would leave the file
            descriptor = _locked(file)
        if descriptor is None:
            with suppress(OSError):
                what += f" (process {file.read_text(encoding='utf-8').strip() or 'unknown'})"
            raise InputError(
                f"another process is {what}; wait until it has ended, or choose another output"
            )
        yield
    finally:
        if descriptor is not None:
            with uninterrupted():
                _unlock(descriptor, file)


def _locked(file: Path) -> int | None:
    try:
        return _lock(file)
    except OSError as error:
        raise InputError(
            f"cannot create a file in {file.parent}: {error}; choose another output"
        ) from error


def _lock(file: Path) -> int | None:
    """Return a descriptor that holds the lock ``file``, or None if another process holds it.

    The owner removes the file before it frees the lock, so a lock that was won on a removed file
    counts for nothing and is tried again.
    """
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder was removed by its last owner meanwhile
            continue
        try:
            is_locked = _try_lock(descriptor)
            if is_locked and _is_at(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not is_locked:
            return None


def _is_at(descriptor: int, file: Path) -> bool:
    """Return whether ``descriptor`` is of the file that is at the path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; return False if another process holds the lock."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(descriptor: int, file: Path) -> None:
    """Remove a lock file and free its lock."""
    if sys.platform == "win32":  # an open file cannot be removed, also not one that another opened
        os.close(descriptor)
        with suppress(OSError):
            file.unlink()
    else:
        file.unlink(missing_ok=True)  # while it is locked: see _lock
        os.close(descriptor)
