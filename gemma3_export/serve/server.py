"""Run the app under uvicorn: listen, drain on a signal, and end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType

import uvicorn

from gemma3_export.api.engine import Engine
from gemma3_export.errors import InputError
from gemma3_export.serve.app import create_app
from gemma3_export.serve.connection import http_protocol
from gemma3_export.serve.gate import Gate, log_to_stderr
from gemma3_export.serve.settings import ServeOptions, require_key

__all__ = ["CLOSE_S", "TICKS_PER_S", "DrainingServer", "bind", "log_listening", "serve"]

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 30
MAX_HEADER_BYTES = 65536
TICKS_PER_S = 10  # of uvicorn
CLOSE_S = 2  # for connections that are left after all requests have been answered


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; connections are refused until it is served.

    Raises:
        InputError: the address is unknown, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would let two servers share the port
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
        return found
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"cannot listen on {host!r:.60}, port {port}: {error}; try another --port or --host"
        ) from error


def serve(engine: Engine, options: ServeOptions, listener: socket.socket) -> int:
    """Answer requests until SIGINT or SIGTERM; then finish the running ones.

    New requests get 503 meanwhile. A second signal, or the end of ``options.drain_s``, cancels
    what is left. Close the engine afterwards.

    Returns:
        0 if every request was answered, otherwise 128 plus the number of the signal.

    Raises:
        InputError: other machines can reach the address, and there is no key.
    """
    require_key(listener.getsockname()[0], options.key)
    log_to_stderr()
    app = create_app(engine, options)
    server = DrainingServer(app, options, partial(engine.aclose, drain=False))
    log_listening(listener, options)
    server.run(sockets=[listener])
    return server.exit_code


def log_listening(listener: socket.socket, options: ServeOptions, **more: int) -> None:
    """Log where the server is."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    facts = {"url": f"http://{shown}:{port}", "model": options.model_name, **more}
    logger.info("listening", extra={"facts": facts})


class DrainingServer(uvicorn.Server):
    """A server that goes on listening while running requests finish.

    Args:
        app: answers requests.
        options: limits, and the names that clients use.
        cancel: ends all requests when their time is up.
    """

    def __init__(
        self, app: Gate, options: ServeOptions, cancel: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(_config(app, options))
        self._app, self._cancel, self._drain_s = app, cancel, options.drain_s
        self._deadline: float | None = None
        self._drain_ticks = 0
        self._signal = 0
        self.exit_code = 0

    @property
    def is_draining(self) -> bool:
        """Whether the server has been told to stop."""
        return self._deadline is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, stop draining."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._drain_s
            self._app.is_draining = True
        else:
            self._deadline = 0.0
        self._signal = int(sig)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; uvicorn asks ``TICKS_PER_S`` times per second."""
        if self._deadline is not None and not self.should_exit:
            if self._drain_ticks % TICKS_PER_S == 0:
                logger.info("draining", extra={"facts": {"requests": self._app.active}})
            self._drain_ticks += 1
            if not self._app.active:
                self.should_exit = True
            elif time.monotonic() >= self._deadline:
                logger.warning("cancelled", extra={"facts": {"requests": self._app.active}})
                self.exit_code = 128 + (self._signal or signal.SIGTERM)
                self.should_exit = True
                await self._cancel()
        return await super().on_tick(counter)


def _config(app: Gate, options: ServeOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=http_protocol(options.header_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
        limit_concurrency=options.max_connections,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
