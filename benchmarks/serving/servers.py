"""Start a server in a process of its own, wait until it is ready, and stop it while it is idle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.environments import free_port
from gemma3_export.errors import Gemma3ExportError

__all__ = ["Limits", "Running", "Server", "llama_server", "our_server", "started"]

START_S = 300.0
POLL_S = 0.05
LOG_TAIL = 2000  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What both servers are started with.

    Args:
        clients: requests that run at once.
        request_tokens: tokens of prompt and answer that one request can have.
        threads: that compute; None leaves them to the server.
        device: ``cpu`` or ``cuda``.
    """

    clients: int
    request_tokens: int
    threads: int | None
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """How to start a server, and what its requests need besides the fields that all share."""

    name: str
    command: Sequence[str]  # without the port
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A server that listens; it runs only inside :meth:`awake`."""

    server: Server
    url: str
    process: subprocess.Popen[bytes]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the process run until the block ends."""
        if sys.platform == "win32":
            raise AssertionError("the command rejects Windows")
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)


def our_server(bundle: Path, limits: Limits) -> Server:
    """Return ``gemma3-export serve`` for a bundle, without the cache of prefixes."""
    command = [sys.executable, "-m", "gemma3_export", "serve", str(bundle.absolute())]
    command += ["--slots", str(limits.clients), "--prefix-cache", "0"]
    command += ["--max-request-tokens", str(limits.request_tokens), "--device", limits.device]
    command += ["--threads", str(limits.threads)] if limits.threads else []
    return Server(name="gemma3-export", command=command)


def llama_server(program: Path, model: Path, limits: Limits) -> Server:
    """Return ``llama-server`` for a GGUF file, with as many slots and without reuse of prompts.

    Its samplers are cut to the one that greedy decoding needs, which is faster than its default
    chain.
    """
    threads = [] if limits.threads is None else ["--threads", str(limits.threads)]
    layers = "999" if limits.device.startswith("cuda") else "0"
    command = [str(program.absolute()), "--model", str(model.absolute()), *threads]
    command += ["--parallel", str(limits.clients), "--cont-batching", "--gpu-layers", layers]
    command += ["--ctx-size", str(limits.clients * limits.request_tokens)]
    command += ["--cache-ram", "0"]
    fields = {"cache_prompt": False, "samplers": ["top_k"], "top_k": 1}
    return Server(name="llama-server", command=command, fields=fields)


@contextmanager
def started(server: Server) -> Iterator[Running]:
    """Start a server on a free port, and kill it when the block ends.

    Raises:
        Gemma3ExportError: it ended, or was not ready in time; its output is in the message.
    """
    with tempfile.TemporaryFile() as log:
        port = free_port()
        process = subprocess.Popen(
            [*server.command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        running = Running(server=server, url=f"http://127.0.0.1:{port}", process=process)
        try:
            if problem := _wait_until_ready(running):
                log.seek(0)
                output = log.read().decode(errors="replace")[-LOG_TAIL:]
                raise Gemma3ExportError(f"{server.name} {problem}; its output:\n{output}")
            process.send_signal(signal.SIGSTOP)
            yield running
        finally:
            process.kill()  # a stopped process ignores SIGTERM, and there is nothing to save
            process.wait()


def _wait_until_ready(running: Running) -> str | None:
    """Return None once the server accepts requests, otherwise what is wrong."""
    deadline = time.monotonic() + START_S
    with httpx.Client(base_url=running.url, trust_env=False) as http:
        while time.monotonic() < deadline:
            if (code := running.process.poll()) is not None:
                return f"ended with exit code {code}"
            try:
                if http.get("/health").status_code == httpx.codes.OK:
                    return None
            except httpx.HTTPError:
                pass
            time.sleep(POLL_S)
    return f"was not ready after {START_S:g} s"
