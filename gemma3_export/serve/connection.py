"""Deadlines for slow clients, and notice of those that have gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h11
from starlette.requests import Request
from starlette.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma3_export.serve.errors import ApiError
from gemma3_export.serve.settings import ServeOptions

__all__ = ["http_protocol", "on_disconnect", "read_body"]


def http_protocol(header_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with a deadline for the headers of each request.

    uvicorn itself closes idle connections, but not those whose headers never end.
    """

    class HeaderDeadline(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the clock while headers are incomplete, unless it runs."""
            if self.conn.their_state is not h11.IDLE or self.timeout_keep_alive_task is not None:
                self._unwatch()
            elif self.timer is None:
                self.timer = self.loop.call_later(header_s, self.transport.abort)

        def _unwatch(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return HeaderDeadline


async def read_body(request: Request, limits: ServeOptions) -> bytes:
    """Return the whole body of a request, which must arrive before the request may queue.

    Raises:
        ApiError: it is too large, too slow, or is not JSON by its type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page cannot send this type to another site without asking, which is never allowed.
    if kind != "application/json":
        raise ApiError(
            415, "the body must be JSON; send Content-Type: application/json", closes=True
        )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.max_body_bytes:
        raise _too_large(limits)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.body_s:g} s; send it faster", closes=True
        ) from None
    return bytes(data)


def _too_large(limits: ServeOptions) -> ApiError:
    return ApiError(
        413, f"the body has more than {limits.max_body_bytes} bytes; send less", closes=True
    )


@asynccontextmanager
async def on_disconnect(receive: Receive, call: Callable[[], Any]) -> AsyncIterator[None]:
    """Call ``call`` if the client closes its connection before the block ends.

    The body must have been read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        call()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
