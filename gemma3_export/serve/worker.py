"""A worker of a supervised server: an engine of its own, on the socket that all workers share.

The supervisor starts ``python -m gemma3_export.serve.worker`` and writes a pickled
:class:`WorkerJob` to its stdin, which stays open until the supervisor ends. The worker reports on
stdout, in lines of JSON: that it is ready, or why it cannot start.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from gemma3_export.api.engine import Engine, EngineOptions
from gemma3_export.api.model_files import open_files
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.serve.app import create_app
from gemma3_export.serve.gate import log_to_stderr
from gemma3_export.serve.server import DrainingServer
from gemma3_export.serve.settings import ServeOptions
from gemma3_export.serve.worker_metrics import WorkerMetrics

__all__ = ["SharedListener", "WorkerJob", "WorkerServer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerJob:
    """What a worker serves, and how.

    Args:
        path: the bundle, or weights.
        engine: options of its engine, with those of loading.
        serve: limits, and the names that clients use.
        count: of workers.
        number: of this worker, from 0.
        listener: descriptor of the bound socket, which is inherited.
        folder: where workers reach each other.
    """

    path: Path
    engine: EngineOptions
    serve: ServeOptions
    count: int
    number: int = 0
    listener: int = -1
    folder: Path = Path()


class SharedListener(socket.socket):
    """A listening socket that other processes accept from, too.

    asyncio accepts all connections that wait when it wakes up. This socket gives it one at a time,
    so that connections that come at once are spread over the workers that wake up.
    """

    _has_turn = False

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection on every other call.

        Raises:
            BlockingIOError: no connection waits, or the others have their turn.
        """
        self._has_turn = not self._has_turn
        if not self._has_turn:
            raise BlockingIOError
        return super().accept()


class WorkerServer(DrainingServer):
    """A server that ends with its engine, because the supervisor starts another one.

    Args:
        engine: generates; the caller closes it.
        job: of this worker.
        report: tells the supervisor something.
    """

    def __init__(
        self, engine: Engine, job: WorkerJob, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self._metrics = WorkerMetrics(
            engine, job.serve.model_name, folder=job.folder, number=job.number, count=job.count
        )
        app = create_app(engine, job.serve, self._metrics)
        super().__init__(app, job.serve, partial(engine.aclose, drain=False))
        self._engine, self._report = engine, report

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and report that."""
        await super().startup(sockets)
        await self._metrics.listen()
        self._report({"ready": True})

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        if not self.is_draining and not self._engine.is_open:
            self.exit_code = 1
            return True
        return await super().on_tick(counter)


def run(job: WorkerJob, report: Callable[[dict[str, Any]], None]) -> int:
    """Serve until the supervisor says otherwise; return the exit code.

    Raises:
        Gemma3ExportError: the model cannot be opened.
    """
    log_to_stderr(worker=job.number)
    engine = Engine(open_files(job.path, job.engine.variant), job.engine)
    try:
        server = WorkerServer(engine, job, report)
        server.run(sockets=[SharedListener(fileno=job.listener)])
        return server.exit_code
    finally:
        engine.close(drain=False)


def main() -> NoReturn:
    """Read a job from stdin and do it."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    with os.fdopen(os.dup(0), "rb") as stdin:
        job = pickle.load(stdin)  # noqa: S301 - from our parent
    threading.Thread(target=_end_with_supervisor, name="supervisor", daemon=True).start()

    def report(fact: dict[str, Any]) -> None:
        _write(reports, fact)

    try:
        code = run(job, report)
    except Gemma3ExportError as error:
        report({"error": str(error), "exit_code": error.exit_code})
        code = error.exit_code
    sys.exit(code)


def _end_with_supervisor() -> None:
    """Drain and end when the supervisor has ended, which closes its end of stdin."""
    while os.read(0, 1):
        continue
    os.kill(os.getpid(), signal.SIGTERM)


def _write(stream: TextIO, fact: dict[str, Any]) -> None:
    stream.write(json.dumps(fact) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
