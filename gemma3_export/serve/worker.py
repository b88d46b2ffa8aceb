"""A worker of a supervised server: an engine of its own, on the socket that all workers share.

The supervisor starts ``python -m gemma3_export.serve.worker`` and writes a pickled
:class:`WorkerJob` to its stdin, which stays open until the supervisor ends. The worker reports on
stdout, in lines of JSON: that it is ready, every second that it works, or why it cannot start.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from gemma3_export.api.engine import Engine, EngineOptions, EngineStats
from gemma3_export.api.model_files import open_files
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.serve.app import create_app
from gemma3_export.serve.gate import log_to_stderr
from gemma3_export.serve.server import CLOSE_S, TICKS_PER_S, DrainingServer
from gemma3_export.serve.settings import ServeOptions
from gemma3_export.serve.worker_metrics import WorkerMetrics

__all__ = ["Pulse", "SharedListener", "WorkerJob", "WorkerServer"]

logger = logging.getLogger(__name__)

END_S = 5.0  # for a worker to end once it has drained


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

    @property
    def stop_s(self) -> float:
        """Seconds after which a worker that was told to stop has ended, unless it hangs."""
        return self.serve.drain_s + CLOSE_S + END_S


class Pulse:
    """Tells an engine that computes from one that hangs.

    Args:
        engine: its totals change with every step.
        step_s: seconds that one step may take.
    """

    def __init__(self, engine: Engine, step_s: float) -> None:
        self._engine, self._step_s = engine, step_s
        self._done: EngineStats | None = None  # without the requests that wait
        self._is_busy = False
        self._changed_at = 0.0

    def beats(self, now: float) -> bool:
        """Return whether the engine is idle, or has finished a step lately.

        Args:
            now: seconds on a clock that never goes back.
        """
        stats = self._engine.stats()  # which takes the engine's lock
        done = replace(stats, waiting=0)  # new requests may wait for an engine that hangs
        is_busy, was_busy = bool(stats.running or stats.waiting), self._is_busy
        self._is_busy = is_busy
        if done != self._done or not (is_busy and was_busy):
            self._done, self._changed_at = done, now
        return now - self._changed_at <= self._step_s


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
        # after a step of this length, no answer is in time
        self._pulse = Pulse(engine, job.serve.request_s)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and report that."""
        await super().startup(sockets)
        await self._metrics.listen()
        self._report({"ready": True})

    async def on_tick(self, counter: int) -> bool:
        """Report that the worker works, once per second; return whether to end."""
        if not self.is_draining and not self._engine.is_open:
            self.exit_code = 1
            return True
        if counter % TICKS_PER_S == 0 and self._pulse.beats(time.monotonic()):
            self._report({"works": True})
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
    reports = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints goes to the log
    with os.fdopen(os.dup(0), "rb") as stdin:
        job = pickle.load(stdin)  # noqa: S301 - from our parent
    threading.Thread(
        target=_end_with_supervisor, args=[job.stop_s], name="supervisor", daemon=True
    ).start()

    def report(fact: dict[str, Any]) -> None:
        # a supervisor that is suspended reads nothing, and must not suspend its workers
        if select.select([], [reports], [], 0)[1]:
            with suppress(BrokenPipeError):  # it has ended, and the other thread sees to it
                os.write(reports, json.dumps(fact).encode() + b"\n")

    try:
        code = run(job, report)
    except Gemma3ExportError as error:
        report({"error": str(error), "exit_code": error.exit_code})
        code = error.exit_code
    sys.exit(code)


def _end_with_supervisor(stop_s: float) -> None:
    """Drain and end when the supervisor has ended, which closes its end of stdin."""
    while os.read(0, 1):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(stop_s)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
