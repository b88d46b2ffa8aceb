"""A replica on Ray Serve: one engine, and the whole app of the server over it.

Replicas receive requests from :mod:`gemma3_export.serve.ray_front`, which has read and checked
them, and return the messages that the app sends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.types import Message, Scope

from gemma3_export.api.engine import Engine, EngineOptions
from gemma3_export.api.model_files import open_files
from gemma3_export.serve.app import create_app
from gemma3_export.serve.gate import route_of
from gemma3_export.serve.settings import ServeOptions

__all__ = ["EngineReplica", "ForwardedRequest", "Outcome", "RayReplicaError"]

Headers = list[tuple[bytes, bytes]]


class RayReplicaError(RuntimeError):
    """The engine of a replica has stopped, so Ray Serve must start another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardedRequest:
    """A request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes

    def scope(self) -> Scope:
        """Return the ASGI scope in which the replica's app handles the request."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": None,
            "server": None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What follows the last message of an answer: what the front's log says about it."""

    route: str
    facts: dict[str, Any] = field(default_factory=dict)


class EngineReplica:
    """An engine and its app.

    Args:
        path: a bundle or weights, on the machine of the replica.
        engine: options of the engine, with those of loading.
        options: limits, and the names that clients use; the front has checked the key.

    Raises:
        Gemma3ExportError: the engine cannot be opened.
    """

    def __init__(self, path: Path, engine: EngineOptions, options: ServeOptions) -> None:
        # The front logs each request; what is left to say goes to the worker's log file.
        logging.getLogger("gemma3_export").setLevel(logging.WARNING)
        self._engine = Engine(open_files(path, engine.variant), engine)
        self._app = create_app(self._engine, replace(options, key=None))
        self._answering: set[asyncio.Task[None]] = set()

    def check_health(self) -> None:
        """Tell Ray Serve whether the replica works.

        Raises:
            RayReplicaError: it does not, and must be replaced.
        """
        if not self._engine.is_open:
            raise RayReplicaError("the engine has stopped")

    async def respond(
        self, request: ForwardedRequest
    ) -> AsyncGenerator[list[Message | Outcome], None]:
        """Yield the app's messages in batches of those that are ready, and then the outcome.

        If the generator is closed or cancelled, the app learns that the client has gone.
        """
        ready: asyncio.Queue[Message | Outcome | Exception] = asyncio.Queue()
        has_gone = asyncio.Event()
        body: list[Message] = [
            {"type": "http.request", "body": request.body, "more_body": False},
        ]
        scope = request.scope()

        async def receive() -> Message:
            if body:
                return body.pop()
            await has_gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            ready.put_nowait(message)

        async def answer() -> None:
            try:
                await self._app(scope, receive, send)
                facts = scope["state"]["log"].facts
                ready.put_nowait(Outcome(route=route_of(scope), facts=facts))
            except Exception as error:  # it belongs to whoever reads
                ready.put_nowait(error)

        # A task of its own, which is not cancelled: it may be submitting to the engine in a thread.
        task = asyncio.create_task(answer())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        try:
            has_ended = False
            while not has_ended:
                batch = [await ready.get()]
                while not ready.empty():
                    batch.append(ready.get_nowait())
                messages = [each for each in batch if not isinstance(each, Exception)]
                if messages:
                    yield messages
                if isinstance(last := batch[-1], Exception):
                    raise last
                has_ended = isinstance(last, Outcome)
        finally:
            has_gone.set()

    async def metrics(self) -> tuple[str, str]:
        """Return the id of the replica, and its metrics in Prometheus' text format."""
        from ray import serve

        request = ForwardedRequest(
            method="GET", path="/metrics", query=b"", headers=[(b"host", b"localhost")], body=b""
        )
        text = b""
        async for batch in self.respond(request):
            for message in batch:
                if not isinstance(message, Outcome):
                    text += message.get("body", b"")
        return serve.get_replica_context().replica_id.unique_id, text.decode()

    def __del__(self) -> None:
        """End the engine; Ray Serve has waited for the requests that were running."""
        if (engine := vars(self).get("_engine")) is not None:
            engine.close(drain=False)
