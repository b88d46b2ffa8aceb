"""The worker processes that a benchmark measures; an idle worker is stopped by a signal."""

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

from gemma3_export import errors
from gemma3_export.bench.peers import InstalledPeer
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.runtimes.onnx.huge_pages import with_huge_pages

__all__ = ["Worker", "own_worker", "peer_worker"]

MEASURED = ("time_to_first_token_s", "decode_s", "tokens", "busy_processors", "peak_memory_bytes")
LOADED = ("import_s", "load_s", "load_peak_memory_bytes", "describe")


class Worker:
    """The process of one candidate; :mod:`gemma3_export.bench.serving` has the protocol."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process
        self.facts: dict[str, Any] = {}

    def ask(self, request: Mapping[str, Any], expected: Sequence[str]) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Args:
            request: what JSON can represent.
            expected: keys that the answer must have.

        Raises:
            Gemma3ExportError: the process ended, reported an error, or sent something else.
        """
        if sys.platform == "win32":
            raise AssertionError("run_benchmark rejects Windows")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it ended; its last answer may say why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Gemma3ExportError(
                f"the benchmark's {self.name} process ended (exit code {self.process.wait()}); "
                "its output above says why. Was there enough memory?"
            )
        answer = self.parse_answer(line, expected)
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def parse_answer(self, line: str, expected: Sequence[str]) -> dict[str, Any]:
        """Return the answer in a line.

        Raises:
            Gemma3ExportError: the line is not the answer that was expected, or reports an error.
        """
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Gemma3ExportError(
                f"the benchmark's {self.name} process sent {line[:80]!r} instead of a JSON object; "
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
                "its worker does not match this version of gemma3-export; set the peer up again"
            )
        return answer

    def measure(self, prompt: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """Measure once, and return the worker's answer."""
        return self.ask({"prompt": prompt, "new_tokens": new_tokens}, MEASURED)

    def write_logits(self, ids: Sequence[int], file: Path) -> None:
        """Have the worker write logits [T, V] after each of ``ids`` to a numpy file."""
        self.ask({"logits_of": list(ids), "file": str(file)}, ("shape",))


@contextmanager
def own_worker(name: str, request: Mapping[str, Any]) -> Iterator[Worker]:
    """Start one of our own candidates; see :mod:`gemma3_export.bench.worker`.

    With ``huge_pages`` in the request, its C library asks for them, as that of ``serve`` does.
    """
    # The worker must import the same package, wherever this process imported it from.
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    variables = os.environ | variables
    if request.get("huge_pages"):
        variables = with_huge_pages(variables) or variables
    command = [sys.executable, "-m", "gemma3_export.bench.worker"]
    with started(name, command, request, variables) as worker:
        yield worker


@contextmanager
def peer_worker(peer: InstalledPeer, threads: int) -> Iterator[Worker]:
    """Start a peer in its own environment."""
    request = {"model": str(peer.model), "format": peer.weight_format, "threads": threads}
    # Packages of this environment must not reach the peer's.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with started(peer.spec, peer.command, request, variables) as worker:
        yield worker


def check_threads(worker: Worker, threads: int) -> None:
    """Check that the candidate's library really uses ``threads``.

    Raises:
        Gemma3ExportError: it reports another number.
    """
    found = worker.facts["describe"].get("threads")
    if found != threads:
        raise Gemma3ExportError(
            f"{worker.name} would run with {found} threads instead of {threads}, so speeds would "
            f"not be comparable; its library ignores the setting. Pass --threads {found}, or leave "
            f"{worker.name} out"
        )


@contextmanager
def started(
    name: str, command: Sequence[str], request: Mapping[str, Any], variables: Mapping[str, str]
) -> Iterator[Worker]:
    """Start a process, have it load a model, and kill it when the context ends."""
    threads = str(request["threads"])
    process = subprocess.Popen(  # noqa: S603  (our own command)
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Some libraries size their thread pools from this variable when they are imported.
        env={**variables, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
    )
    worker = Worker(name, process)
    try:
        worker.facts = worker.ask(request, LOADED)
        check_threads(worker, request["threads"])
        yield worker
    finally:
        process.kill()  # a stopped process ignores SIGTERM, and there is nothing to save
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # unread requests are still in the buffer
                    pipe.close()
