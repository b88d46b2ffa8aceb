"""Disks that fill up: a small file system in memory, or a limit on the size of files."""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.harness import children
from tests.faults.harness.cases import INPUT, OUTPUT, Result
from tests.faults.harness.children import Limits
from tests.faults.harness.commands import (
    COMMANDS,
    clean_digest,
    digest,
    prepared_place,
    with_old_output,
)
from tests.faults.harness.outcomes import Verdict, verdict_of_ending

DISK = "disk"
COULD_NOT_RUN = "could not run"


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """Mount a file system of ``size_bytes`` at ``folder``.

    Raises:
        OSError: this process may not mount file systems.
    """
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@functools.cache
def problem() -> str | None:
    """Return why no file system can be mounted here, or None."""
    with children.scratch_folder() as folder:
        try:
            with small_disk(folder / DISK, 2**20):
                return None
        except OSError as error:
            return str(error)


@functools.cache
def _size_of_output(name: str) -> int:
    with prepared_place() as place:
        finished = children.run(COMMANDS[name].to(OUTPUT), place)
        assert finished.code == 0, finished
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def disk_case(seed: int, folder: Path) -> Result:
    """Let the disk fill up at any point; nothing partial is left, and old output is kept."""
    del folder
    rng = random.Random(f"disk:{seed}")
    name, is_replacing = rng.choice(list(COMMANDS)), rng.random() < 0.3
    size = int(_size_of_output(name) * rng.uniform(0, 1.3)) // 4096 * 4096 + 4096
    is_limit = problem() is not None or rng.random() < 0.3
    case = f"{name}{' --force' if is_replacing else ''}: {size} bytes{' a file' * is_limit}"
    with prepared_place() as place:
        if is_limit:
            limit = rng.randrange(1, size)
            return _on(place, name, OUTPUT, is_replacing, seed, case, Limits(file_bytes=limit))
        old_bytes = 0
        if is_replacing:
            with_old_output(name, place)
            old_bytes = sum(p.stat().st_size + 4096 for p in (place / OUTPUT).rglob("*"))
        with small_disk(place / DISK, size + old_bytes):
            if is_replacing:
                shutil.move(place / OUTPUT, place / DISK / OUTPUT)
            return _on(place, name, f"{DISK}/{OUTPUT}", False, seed, case, Limits())


def _on(
    place: Path, name: str, output: str, is_new: bool, seed: int, case: str, limits: Limits
) -> Result:
    if is_new:
        with_old_output(name, place)
    target = place / output
    old = digest(target)
    finished = children.run(COMMANDS[name].to(output, force=bool(old)), place, limits=limits)
    verdict = verdict_of_ending(finished)
    if verdict.is_good:
        verdict = _judge(name, target, old, finished.code, verdict)
    return Result("disk", seed, case, verdict, str(finished))


def _judge(name: str, target: Path, old: dict[str, str], code: int, good: Verdict) -> Verdict:
    found = {path.name for path in target.parent.iterdir()} - {INPUT, DISK}
    kept = COMMANDS[name].keeps if code else frozenset()
    if code == 0 and digest(target) != clean_digest(name):
        return Verdict("wrong result", "exit 0, but the output is not complete")
    if code and old and name != "train" and digest(target) != old:
        return Verdict("lost", "the old output was not kept")
    allowed = {OUTPUT} if code == 0 or old else set()
    if found - kept != allowed - kept:
        return Verdict("leftovers", f"the folder has {sorted(found)}, not {sorted(allowed)}")
    partial = [path.name for path in target.rglob(".*.partial")]
    return Verdict("leftovers", f"the output has {partial}") if partial else good
