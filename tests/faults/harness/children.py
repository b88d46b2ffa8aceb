"""Run the command line in children, each forked from a process that has everything imported.

A command starts in milliseconds instead of seconds. Every child has limits on its CPU time, its
memory and the time on the clock, and its own session, so that all it started ends with it.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRELOADED = "tests.faults.harness.warmed"
CPU_S = 40
TIMEOUT_S = 60  # a net under what waits without computing, such as a read from a FIFO
MEMORY_BYTES = 4 * 2**30  # more than the zygote has mapped


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one child; a file size of -1 is unlimited."""

    cpu_s: int = CPU_S
    timeout_s: float = TIMEOUT_S
    memory_bytes: int = MEMORY_BYTES
    file_bytes: int = -1


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a child ended."""

    code: int  # of its exit; -N if signal N killed it
    stdout: str
    stderr: str
    is_late: bool = False  # killed by the limit on the time

    def __str__(self) -> str:
        return f"exit {self.code}\nstdout: {self.stdout[-2000:]}\nstderr: {self.stderr[-4000:]}"


@dataclass
class Child:
    """A running child; its output goes to files, which do not fill up as a pipe does."""

    process: Any
    logs: Path
    limits: Limits = field(default_factory=Limits)

    def send(self, number: int) -> None:
        """Send a signal, unless the child has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self) -> Finished:
        """Wait for the end, kill what is late, and return what it printed."""
        self.process.join(self.limits.timeout_s)
        is_late = self.process.exitcode is None
        with suppress(ProcessLookupError):  # what the child started, too
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        stdout, stderr = ((self.logs / name).read_bytes() for name in ("stdout", "stderr"))
        shutil.rmtree(self.logs)
        return Finished(
            code=self.process.exitcode,
            stdout=stdout.decode(errors="backslashreplace"),
            stderr=stderr.decode(errors="backslashreplace"),
            is_late=is_late or self.process.exitcode == -signal.SIGXCPU,
        )


def start(
    arguments: Sequence[str],
    folder: Path,
    *,
    stdin: bytes = b"",
    limits: Limits | None = None,
    before: Callable[[], None] | None = None,
) -> Child:
    """Start ``gemma3-export`` with ``arguments`` in the current folder ``folder``.

    Args:
        arguments: of the command line.
        folder: the current folder of the child.
        stdin: what it reads.
        limits: its limits.
        before: called in the child before the command line.
    """
    return _start(_command_line, (list(arguments), before), folder, stdin, limits or Limits())


def run(arguments: Sequence[str], folder: Path, **options: Any) -> Finished:
    """Run ``gemma3-export`` to its end; see :func:`start`."""
    return start(arguments, folder, **options).wait()


def call(function: Callable[..., object], *arguments: Any, folder: Path) -> Finished:
    """Call a function in a child, where a crash hurts nobody; it prints what it returns."""
    return _start(_print_result, (function, arguments), folder, b"", Limits()).wait()


def _start(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: Path,
    stdin: bytes,
    limits: Limits,
) -> Child:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    logs = Path(tempfile.mkdtemp(prefix="child-"))
    (logs / "stdin").write_bytes(stdin)
    for name in ("stdout", "stderr"):
        (logs / name).touch()
    process = context.Process(target=_in_child, args=(target, arguments, folder, logs, limits))
    process.start()
    return Child(process, logs, limits)


def _in_child(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: Path,
    logs: Path,
    limits: Limits,
) -> None:
    os.setsid()
    _redirect(logs)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 5))
    if limits.file_bytes >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + limits.memory_bytes,) * 2)
    target(*arguments)


def _redirect(logs: Path) -> None:
    """Give the child files as its standard streams, below Python and in it."""
    modes = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY, "stderr": os.O_WRONLY}
    for number, (name, mode) in enumerate(modes.items()):
        opened = os.open(logs / name, mode | (os.O_APPEND if number else 0))
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (for the life of the child)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        open(2, "wb", buffering=0, closefd=False),  # noqa: SIM115
        encoding="utf-8",
        errors="backslashreplace",
        write_through=True,
    )


def _command_line(arguments: list[str], before: Callable[[], None] | None) -> None:
    from gemma3_export.cli import main

    sys.argv = ["gemma3-export", *arguments]
    if before is not None:
        before()
    main()


def _print_result(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    if result is not None:
        print(result)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder and remove it at the end, whatever a case made of it."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
