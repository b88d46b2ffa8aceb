"""Open the files that a user names: regular files, of a limited size, with errors that name them.

Opening a FIFO waits for a writer that may never come, and a device may never end, so both are
rejected before anything is read.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from io import BufferedReader
from pathlib import Path

from gemma3_export.errors import InputError

__all__ = [
    "check_regular",
    "is_file",
    "open_regular",
    "read_bytes",
    "read_text",
    "to_path",
]

PIPE_BYTES = 2**20  # the first request to a pipe, whose size is unknown
MAX_NAME_BYTES = 255  # of one name in a path, on every file system of Linux
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# Opening does not wait for the writer of a FIFO. Windows, where files have no such type, would
# translate line ends.
if sys.platform == "win32":
    READ_FLAGS = os.O_RDONLY | os.O_BINARY
else:
    READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def to_path(value: object, what: str = "the path", *, any_bytes: bool = False) -> Path:
    """Return ``value``, a string or a path, as a path.

    Args:
        value: what a caller gave.
        what: the name of the argument, for the message.
        any_bytes: also accept a name that is not UTF-8, which JSON cannot record and the libraries
            that open weights and graphs reject.

    Raises:
        InputError: it is neither, or no file can have this name.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{what} is {value!r:.60}; it must be a string or a Path")
    found = os.fspath(value)
    if not isinstance(found, str):
        raise InputError(f"{what} is {value!r:.60}; it must be a string or a Path, not bytes")
    if not found or "\0" in found:
        raise InputError(f"{what} is {found!r:.60}, which is not a path; give the path of a file")
    try:
        encoded = os.fsencode(found)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} {found!r:.200} has half of a surrogate pair, which no file name has; correct "
            "it"
        ) from error
    try:
        found.encode()
    except UnicodeEncodeError as error:
        if not any_bytes:
            raise InputError(
                f"{what} {encoded!r:.200} has a name that is not UTF-8; rename it"
            ) from error
    longest = max(map(len, encoded.split(b"/")))
    if longest > MAX_NAME_BYTES:
        raise InputError(
            f"{what} {found!r:.60} contains a name of {longest} bytes; no file has a name of more "
            f"than {MAX_NAME_BYTES}"
        )
    return Path(found)


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a regular file; False if nothing is there.

    Raises:
        InputError: that cannot be found out, for example without permission.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except ValueError:  # a null byte
        return False
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise _unreadable(path, error) from error


def check_regular(path: Path) -> int:
    """Check that a library can open ``path`` by its name; return the size in bytes.

    Raises:
        InputError: it does not exist, is not a regular file, or is not readable.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def open_regular(path: Path, *, or_pipe: bool = False) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: the file.
        or_pipe: accept a pipe too, such as a shell's ``<(command)``. A FIFO that nobody writes to
            reads as empty.

    Raises:
        InputError: it does not exist, is something else, or is not readable.
    """
    try:
        descriptor = os.open(path, READ_FLAGS)
    except ValueError as error:
        raise InputError(f"{str(path)!r:.60} is not a path; give the path of a file") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG and not (or_pipe and kind == stat.S_IFIFO):
        os.close(descriptor)
        raise InputError(f"{path} is {KINDS.get(kind, 'not a file')}; give a regular file")
    if sys.platform != "win32":
        os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, limit_bytes: int, or_pipe: bool = False) -> bytes:
    """Read a file of at most ``limit_bytes``.

    Raises:
        InputError: see :func:`open_regular`; or it is larger.
    """
    with open_regular(path, or_pipe=or_pipe) as file:
        try:
            # Asked for n bytes, Python allocates n, and limits are far above most files.
            data = file.read(min(os.fstat(file.fileno()).st_size, limit_bytes) + 1)
            while (room := limit_bytes + 1 - len(data)) and (
                more := file.read(min(room, max(len(data), PIPE_BYTES)))
            ):
                data += more
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(data) > limit_bytes:
        raise InputError(
            f"{path} is larger than {limit_bytes / 2**20:g} MiB, the limit for such a file; it is "
            "damaged or of another kind"
        )
    return data


def read_text(path: Path, *, limit_bytes: int, or_pipe: bool = False) -> str:
    """Read a UTF-8 text file of at most ``limit_bytes``, without a byte order mark.

    Raises:
        InputError: see :func:`read_bytes`; or it is not UTF-8.
    """
    data = read_bytes(path, limit_bytes=limit_bytes, or_pipe=or_pipe)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    if error.errno in NOT_THERE:
        return InputError(f"{path} does not exist; give the path of a file")
    if error.errno == errno.EACCES and _is_folder(path):  # Windows opens no folder
        return InputError(f"{path} is {KINDS[stat.S_IFDIR]}; give a regular file")
    if error.errno == errno.ENXIO:  # opening a socket
        return InputError(f"{path} is a socket; give a regular file")
    return InputError(
        f"{path} cannot be read: {error.strerror or error}; check its path and permissions"
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
