"""Hostile things where a file is expected: links, pipes, folders, devices, and odd names."""

from __future__ import annotations

import os
import random
import shutil
import socket
from contextlib import suppress
from pathlib import Path

HARMLESS = "link to a copy"


def replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in the place of the file ``path``; return the name of the change."""
    kind = rng.choice(
        (
            "missing",
            "empty",
            "folder",
            "pipe",
            "socket",
            "link to itself",
            "dangling link",
            HARMLESS,
            "link to /dev/zero",
            "link to /dev/null",
            "link to its folder",
            "sparse terabyte",
            "text",
        )
    )
    data = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.bind(os.path.relpath(path))
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == HARMLESS:
        (path.parent / "elsewhere").mkdir(exist_ok=True)
        (path.parent / "elsewhere" / path.name).write_bytes(data)
        path.symlink_to(Path("elsewhere") / path.name)
    elif kind.startswith("link to /dev"):
        path.symlink_to(kind.removeprefix("link to "))
    elif kind == "link to its folder":
        path.symlink_to(".")
    elif kind == "sparse terabyte":
        path.write_bytes(data)
        os.truncate(path, 2**40)
    elif kind == "text":
        path.write_text("Call me Ishmael.\n" * 50)
    return f"{path.name}: {kind}"


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of shared inputs to a place where it may be changed."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
