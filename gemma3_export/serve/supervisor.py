"""Keep several workers running: start them, replace those that die or hang, pass signals on.

A supervisor computes nothing. It holds the listening socket, which its workers inherit, so that
clients that connect while a worker is replaced wait instead of being refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.limits import shown
from gemma3_export.serve.gate import log_to_stderr
from gemma3_export.serve.server import log_listening
from gemma3_export.serve.settings import require_key
from gemma3_export.serve.worker import WorkerJob

__all__ = ["RestartPolicy", "Supervisor", "supervise"]

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "gemma3_export.serve.worker")
MAX_FOLDER_BYTES = 90  # a Unix socket has a path of about 100
CHECKS = 10  # without a report before a worker is killed
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """When a worker is killed, and when one that has ended is started again.

    Args:
        delays_s: seconds to wait after the first, second, ... early end in a row. One more early
            end, and the supervisor gives up.
        early_s: an end is early if it comes within this many seconds of the start.
        silent_s: a worker that has been ready hangs if it reports nothing for so many seconds.
    """

    delays_s: Sequence[float] = (0, 1, 2, 4, 8)
    early_s: float = 60.0
    silent_s: float = 30.0


def supervise(job: WorkerJob, listener: socket.socket) -> int:
    """Serve with several workers until SIGINT or SIGTERM; then finish the running requests.

    Args:
        job: what workers share; their numbers and the rest are filled in.
        listener: the bound socket.

    Returns:
        0 if every request was answered, otherwise 128 plus the number of the signal.

    Raises:
        InputError: other machines can reach the address, and there is no key; or the path of the
            temporary folder is too long.
        Gemma3ExportError: a worker cannot start, or ends again and again.
    """
    require_key(listener.getsockname()[0], job.serve.key)
    log_to_stderr()
    with TemporaryDirectory(prefix="gemma3-serve-") as folder:
        if len(os.fsencode(folder)) > MAX_FOLDER_BYTES:
            raise InputError(
                f"the path {folder:.200} is too long for sockets; set TMPDIR to a shorter one"
            )
        job = replace(job, listener=listener.fileno(), folder=Path(folder))
        supervisor = Supervisor(
            [pickle.dumps(replace(job, number=number)) for number in range(job.count)],
            descriptors=(job.listener,),
            on_ready=lambda: log_listening(listener, job.serve, workers=job.count),
            stop_s=job.stop_s,
        )
        return asyncio.run(supervisor.run())


class Supervisor:
    """Runs one process per job until it is told to stop.

    Args:
        jobs: what each worker reads from its stdin, which stays open while the supervisor runs.
        descriptors: open files that workers inherit.
        on_ready: called when the first worker reports that it is ready.
        stop_s: seconds after which workers that have been told to stop are killed.
        command: the program of a worker. It writes lines of JSON to stdout: ``{"ready": true}`` and
            then ``{"works": true}`` every second, or ``{"error": MESSAGE, "exit_code": CODE}``.
        policy: when a worker is killed, and when it is started again.
    """

    def __init__(
        self,
        jobs: Sequence[bytes],
        *,
        descriptors: Sequence[int] = (),
        on_ready: Callable[[], None],
        stop_s: float,
        command: Sequence[str] = COMMAND,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._jobs, self._descriptors, self._command = jobs, descriptors, command
        self._on_ready, self._stop_s = on_ready, stop_s
        self._policy = RestartPolicy() if policy is None else policy
        self._processes: dict[int, Process] = {}
        self._was_ready = False
        self._signal = 0
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Start the workers, and keep them running until :meth:`stop` or a signal.

        Returns:
            0 if every worker ended well, otherwise 128 plus the number of the signal.

        Raises:
            Gemma3ExportError: a worker cannot start, or ends again and again.
        """
        loop = asyncio.get_running_loop()
        numbers = [
            number
            for number in (getattr(signal, name) for name in SIGNALS)
            if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
        ]
        for number in numbers:
            loop.add_signal_handler(number, self.stop, number)
        try:
            keepers = [asyncio.create_task(self._keep(each)) for each in range(len(self._jobs))]
            await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
            if not self._stopping.is_set():  # one has given up
                self.stop(signal.SIGTERM)
            ends = await asyncio.gather(*keepers, return_exceptions=True)
        finally:
            self._kill()
            for number in numbers:
                loop.remove_signal_handler(number)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        # SIGTERM kills a worker only while it has no requests: before it serves, and after
        is_clean = set(ends) <= {0, -signal.SIGTERM}
        return 0 if is_clean else 128 + self._signal

    def stop(self, number: int) -> None:
        """Let workers finish their requests; at the second call, do not."""
        self._signal = number
        for process in self._processes.values():
            _send(process, signal.SIGTERM)
        if not self._stopping.is_set():
            self._stopping.set()
            asyncio.get_running_loop().call_later(self._stop_s, self._kill)

    async def _keep(self, number: int) -> int:
        """Run a worker again and again; return the exit code of the one that was told to stop.

        Raises:
            Gemma3ExportError: it cannot start, or ends again and again.
        """
        early = 0
        while True:
            started = time.monotonic()
            code, error = await self._run_once(number)
            if self._stopping.is_set():
                return code
            if error is not None and not self._was_ready:
                raise error
            is_early = time.monotonic() - started < self._policy.early_s
            early = early + 1 if is_early else 1
            cause = _cause(code)
            facts = {"worker": number, "cause": cause, "reason": error and str(error)}
            logger.error("worker ended", extra={"facts": facts})
            if early > len(self._policy.delays_s):
                raise Gemma3ExportError(
                    f"worker {number} has ended {early} times in a row within "
                    f"{self._policy.early_s:g} s of its start, and the last one {cause}: "
                    f"{error or 'the log above says what it did'}; correct the cause and start "
                    "the server again"
                )
            with suppress(TimeoutError):
                async with asyncio.timeout(self._policy.delays_s[early - 1]):
                    await self._stopping.wait()
                    return 0

    async def _run_once(self, number: int) -> tuple[int, Gemma3ExportError | None]:
        """Run a worker until it ends; return its exit code, and its error if it reported one."""
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=self._descriptors,
            start_new_session=True,  # Ctrl-C reaches the supervisor alone
        )
        self._processes[number] = process
        if self._stopping.is_set():
            _send(process, signal.SIGTERM)
        assert process.stdin is not None
        assert process.stdout is not None
        error = None
        watch = _Watch(process, self._policy.silent_s)
        try:
            with suppress(ConnectionError):  # it has ended already
                process.stdin.write(self._jobs[number])
                await process.stdin.drain()
            async for line in process.stdout:
                report = json.loads(line)
                watch.hear()
                if "works" in report:
                    continue
                if "error" in report:
                    error = Gemma3ExportError(report["error"])
                    error.exit_code = report["exit_code"]
                    continue
                watch.start()
                if not self._was_ready:
                    self._was_ready = True
                    self._on_ready()
                facts = {
                    "worker": number,
                    "pid": process.pid,
                    "start_s": round(time.monotonic() - started, 2),
                }
                logger.info("worker ready", extra={"facts": facts})
            return await process.wait(), error or watch.error
        finally:
            watch.stop()
            _send(process, signal.SIGKILL)
            process.stdin.close()
            del self._processes[number]

    def _kill(self) -> None:
        for process in self._processes.values():
            _send(process, signal.SIGKILL)


class _Watch:
    """Kills a worker that reports nothing for too long.

    Args:
        process: the worker.
        silent_s: how long is too long.

    Attributes:
        error: why the worker was killed; None if it was not.
    """

    def __init__(self, process: Process, silent_s: float) -> None:
        self._process, self._silent_s = process, silent_s
        self._silent_checks = 0
        self._task: asyncio.Task[None] | None = None
        self.error: Gemma3ExportError | None = None

    def hear(self) -> None:
        """Note that the worker has reported something."""
        self._silent_checks = 0

    def start(self) -> None:
        """Begin to watch."""
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """End watching."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        # Checks are counted, and time is not: it also passes while the whole machine is suspended.
        while self._silent_checks < CHECKS:
            await asyncio.sleep(self._silent_s / CHECKS)
            self._silent_checks += 1
        self.error = Gemma3ExportError(f"it had reported nothing for {self._silent_s:g} s")
        _send(self._process, signal.SIGKILL)


def _send(process: Process, number: int) -> None:
    """Send a signal to a worker, unless it has ended."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.send_signal(number)


def _cause(code: int) -> str:
    """Return how a process ended."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {shown(-code)}"
