"""The processes that a benchmark measures: each is stopped whenever nobody waits for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.peers import InstalledPeer
from gemma3_export import errors
from gemma3_export.errors import Gemma3ExportError

__all__ = ["Worker", "own_worker", "peer_worker"]

MEASURED = ("time_to_first_token_s", "decode_s", "tokens", "busy_processors", "peak_memory_bytes")
LOADED = ("import_s", "load_s", "load_peak_memory_bytes", "describe")


class Worker:
    """A candidate's process."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process
        self.facts: dict[str, Any] = {}

    def ask(self, message: Mapping[str, Any], expected: Sequence[str]) -> dict[str, Any]:
        """Send one line and wait for the answer.

        Args:
            message: what JSON can hold.
            expected: keys that the answer has.

        Raises:
            Gemma3ExportError: the process ended, reported an error, or answered something else.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it ended; what it said before may tell why
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Gemma3ExportError(
                f"the benchmark's {self.name} process ended (exit code {self.process.wait()}); "
                "its output above says why. Was there enough memory?"
            )
        answer = self.understand(line, expected)
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def understand(self, line: str, expected: Sequence[str]) -> dict[str, Any]:
        """The answer in a line, or the error that it reports."""
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Gemma3ExportError(
                f"the benchmark's {self.name} process answered {line[:80]!r}, which is no answer; "
                "set the peer up again"
            )
        if "error" in answer:
            kind, message = str(answer["error"]), str(answer.get("message"))
            if kind in errors.__all__:
                raise getattr(errors, kind)(message)
            raise Gemma3ExportError(f"{self.name} failed: {kind}: {message}")
        if absent := [key for key in expected if key not in answer]:
            raise Gemma3ExportError(
                f"the benchmark's {self.name} process answered without {', '.join(absent)}; "
                "its worker does not fit this version of gemma3-export"
            )
        return answer

    def measure(self, prompt: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """One measurement, as the worker answers it."""
        return self.ask({"prompt": prompt, "new_tokens": new_tokens}, MEASURED)

    def write_logits(self, ids: Sequence[int], file: Path) -> None:
        """Have logits [T, V] after each of ``ids`` written as a numpy file."""
        self.ask({"logits_of": list(ids), "file": str(file)}, ("shape",))


@contextmanager
def own_worker(name: str, asked: Mapping[str, Any]) -> Iterator[Worker]:
    """One of our own candidates, in this Python; see :mod:`gemma3_export.bench.worker`."""
    # The same package, wherever it was imported from.
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "gemma3_export.bench.worker"]
    with started(name, command, asked, os.environ | variables) as worker:
        yield worker


@contextmanager
def peer_worker(peer: InstalledPeer, threads: int) -> Iterator[Worker]:
    """A peer, in the Python of its environment."""
    asked = {"model": str(peer.model), "format": peer.form, "threads": threads}
    # Packages of this environment must not reach that one.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with started(peer.name, peer.command, asked, variables) as worker:
        yield worker


def check_threads(worker: Worker, threads: int) -> None:
    """All candidates must compute with the same threads, as each of them says itself.

    Raises:
        Gemma3ExportError: one has others.
    """
    found = worker.facts["describe"].get("threads")
    if found != threads:
        raise Gemma3ExportError(
            f"{worker.name} would run with {found} threads instead of {threads}, which compares "
            "nothing; its library does not follow the setting"
        )


@contextmanager
def started(
    name: str, command: Sequence[str], asked: Mapping[str, Any], variables: Mapping[str, str]
) -> Iterator[Worker]:
    """A process that has loaded what was ``asked``, and ends with the context."""
    threads = str(asked["threads"])
    process = subprocess.Popen(  # noqa: S603  (our own command)
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Some libraries size their pools by this before anybody can tell them.
        env={**variables, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
    )
    worker = Worker(name, process)
    try:
        worker.facts = worker.ask(asked, LOADED)
        check_threads(worker, asked["threads"])
        yield worker
    finally:
        process.kill()  # it may be stopped, and has nothing to save
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it never read is still in the buffer
                    pipe.close()
