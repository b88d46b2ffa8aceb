"""The front of a server whose engines run on Ray Serve: it forwards requests to their replicas.

The front reads and limits bodies, passes each request to a replica, and sends on what comes back.
Ray Serve retries only until a replica has accepted a request. The front also retries after that,
until the first byte of the answer has arrived: a replica that dies then costs time, and no answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import NodeDiedError, RayActorError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, RequestCancelledError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from gemma3_export.errors import QueueFullError
from gemma3_export.serve.app import LAST_EVENT_S
from gemma3_export.serve.connection import on_disconnect, read_body
from gemma3_export.serve.errors import ApiError, ClientGoneError, to_api_error
from gemma3_export.serve.gate import Gate
from gemma3_export.serve.metrics import CONTENT_TYPE, metrics_text
from gemma3_export.serve.ray_replica import ForwardedRequest, Outcome
from gemma3_export.serve.responses import event
from gemma3_export.serve.settings import ServeOptions

__all__ = ["Front", "create_front"]

ATTEMPTS = 3  # a request that kills each of its replicas must not kill them all
BUSY_S = 0.1  # between retries of a request whose replica died while all others are full
METRICS_S = 5.0  # for a replica that starts, ends or hangs
FULL = (429, 503)
DIED = (RayActorError, WorkerCrashedError, NodeDiedError)


class Front:
    """ASGI app that forwards requests to replicas.

    Args:
        replicas: handle of the deployment of :class:`.ray_replica.EngineReplica`.
        options: limits, and the names that clients use.
    """

    def __init__(self, replicas: Any, options: ServeOptions) -> None:
        self._replicas, self._options = replicas, options
        self._running: set[asyncio.Task[Any]] = set()
        self._is_stopped = False
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "http_requests",
            "Answered requests by path and status.",
            ["model_name", "path", "status", "replica"],
            registry=self._registry,
        )
        self._retries = Counter(
            "gemma3_export:request_retries",
            "Requests that were given to another replica because theirs died.",
            ["model_name", "replica"],
            registry=self._registry,
        ).labels(options.model_name, "front")
        self._answering = Gauge(
            "gemma3_export:replicas",
            "Replicas whose metrics are here.",
            ["model_name", "replica"],
            registry=self._registry,
        ).labels(options.model_name, "front")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request.

        Raises:
            ApiError: it is invalid, or there is no room for it.
            ClientGoneError: nobody waits for the answer.
        """
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"] == "/health":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif scope["path"] == "/metrics" and scope["method"] == "GET":
            headers = {"content-type": CONTENT_TYPE}
            await Response(await self._metrics(), headers=headers)(scope, receive, send)
        else:
            await self._forward(scope, receive, send)

    def count(self, route: str, status: int) -> None:
        """Count a response that no replica has counted."""
        if route == "none":
            self._responses.labels(self._options.model_name, route, str(status), "front").inc()

    async def aclose(self) -> None:
        """End all requests."""
        self._is_stopped = True
        for task in self._running:
            task.cancel()

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = b""
        if scope["method"] == "POST":
            body = await read_body(request, self._options)
        forwarded, answer = _forwarded(scope, body), _Answer(scope, send)
        async with self._ended_early(receive, answer):
            try:
                async with (
                    asyncio.timeout(self._options.request_s),
                    aclosing(self._messages(forwarded)) as batches,
                ):
                    async for batch in batches:
                        await answer.send(batch)
            except Exception as error:
                await answer.fail(error)

    @asynccontextmanager
    async def _ended_early(self, receive: Receive, answer: _Answer) -> AsyncIterator[None]:
        """Cancel the block if its client goes, or the server stops.

        Raises:
            ClientGoneError: the client has gone.
            ApiError: the server has stopped.
        """
        task = asyncio.current_task()
        assert task is not None
        has_gone = False

        def give_up() -> None:
            nonlocal has_gone
            if not answer.has_ended:  # after its end, servers report every client as gone
                has_gone = True
                task.cancel()

        self._running.add(task)
        try:
            async with on_disconnect(receive, give_up):
                yield
        except asyncio.CancelledError:
            if has_gone:
                task.uncancel()
                raise ClientGoneError from None
            if self._is_stopped:
                task.uncancel()
                raise ApiError(
                    503, "the server has stopped before the answer was complete"
                ) from None
            raise
        finally:
            self._running.discard(task)

    async def _messages(
        self, request: ForwardedRequest
    ) -> AsyncGenerator[list[Message | Outcome], None]:
        """Yield the messages of an answer, from whichever replica lives until it begins.

        Raises:
            Exception: the request failed; or its replica died, and the answer had begun.
        """
        deaths = 0
        while True:
            held: list[Message | Outcome] = []
            has_begun = False
            try:
                async with aclosing(self._attempt(request)) as batches:
                    async for batch in batches:
                        if has_begun:
                            yield batch
                            continue
                        held += batch
                        if deaths and _status(held) in FULL:
                            break
                        if has_begun := any(_has_content(each) for each in held):
                            yield held
                    else:
                        return
            except DIED as error:
                deaths += 1
                if has_begun:
                    raise ApiError(
                        503, "the replica died before the answer was complete; try again"
                    ) from error
                if deaths == ATTEMPTS:
                    raise ApiError(
                        503, f"{deaths} replicas died with this request; it is not tried again"
                    ) from error
                self._retries.inc()
            except BackPressureError:
                if not deaths:
                    raise QueueFullError("the queues of all replicas are full") from None
                await asyncio.sleep(BUSY_S)
            else:
                await asyncio.sleep(BUSY_S)

    async def _attempt(
        self, request: ForwardedRequest
    ) -> AsyncGenerator[list[Message | Outcome], None]:
        """Yield what one replica answers; if nobody reads on, cancel it there."""
        response = self._replicas.options(method_name="respond", stream=True).remote(request)
        has_ended = False
        try:
            async for batch in response:
                yield batch
            has_ended = True
        finally:
            if not has_ended:
                response.cancel()

    async def _metrics(self) -> bytes:
        """Return the metrics of the front and of all replicas that answer.

        Raises:
            ApiError: a replica takes too long.
        """
        try:
            async with asyncio.timeout(METRICS_S):
                answers = self._replicas.broadcast("metrics")
                found = await answers.results_async(return_exceptions=True)
        except TimeoutError as error:
            raise ApiError(503, "a replica does not answer; try again later") from error
        texts = [each for each in found if not isinstance(each, BaseException)]
        self._answering.set(len(texts))
        families = list(self._registry.collect())
        for name, text in texts:
            for family in text_string_to_metric_families(text):
                family.samples = [
                    sample._replace(labels={**sample.labels, "replica": name})
                    for sample in family.samples
                ]
                families.append(family)
        return metrics_text(families)


class _Answer:
    """An answer on its way to the client.

    Attributes:
        has_ended: whether the client has all of it.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._is_stream = self.has_ended = False

    async def send(self, batch: list[Message | Outcome]) -> None:
        """Send messages of the replica; its facts go to the log."""
        for message in batch:
            if isinstance(message, Outcome):
                self._scope["route"] = _Route(message.route)
                self._scope["state"]["log"].facts |= message.facts
                continue
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                self._is_stream = kind.startswith(b"text/event-stream")
            else:
                self.has_ended = not message.get("more_body", False)
            await self._send(message)

    async def fail(self, error: Exception) -> None:
        """Report an error: as the last event of a stream, or by raising it."""
        if isinstance(error, (TaskCancelledError, RequestCancelledError)):
            raise ClientGoneError from error
        if not self._is_stream:
            raise error
        self._scope["state"]["log"].facts["error"] = str(error)[:200]
        last = event(to_api_error(error).to_json())
        async with asyncio.timeout(LAST_EVENT_S):
            await self._send({"type": "http.response.body", "body": last, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True, slots=True)
class _Route:
    """The route that a replica matched, in the form that the gate reads."""

    path: str


def create_front(replicas: Any, options: ServeOptions) -> tuple[Gate, Front]:
    """Return the ASGI app of a front, and the front inside its gate.

    Args:
        replicas: handle of the deployment of :class:`.ray_replica.EngineReplica`.
        options: limits, and the names that clients use.
    """
    front = Front(replicas, options)
    return Gate(front, options, front.count), front


def _forwarded(scope: Scope, body: bytes) -> ForwardedRequest:
    """Return a request as a replica gets it: without the key, and from this machine."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name not in (b"host", b"authorization", b"x-request-id", b"transfer-encoding")
    ]
    request_id = scope["state"]["log"].request_id.encode()
    return ForwardedRequest(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"],
        headers=[*headers, (b"host", b"localhost"), (b"x-request-id", request_id)],
        body=body,
    )


def _status(messages: list[Message | Outcome]) -> int | None:
    """Return the status of an answer, if its start is among the messages."""
    for message in messages:
        if not isinstance(message, Outcome) and message["type"] == "http.response.start":
            return int(message["status"])
    return None


def _has_content(message: Message | Outcome) -> bool:
    """Return whether the client would see that the answer has begun."""
    if isinstance(message, Outcome) or message["type"] != "http.response.body":
        return False
    return bool(message.get("body")) or not message.get("more_body", False)
