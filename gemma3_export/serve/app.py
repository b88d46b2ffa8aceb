"""The ASGI app: the endpoints of the OpenAI API, health, metrics and the playground."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from gemma3_export import __version__
from gemma3_export.api.engine import Engine
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.serve.connection import on_disconnect, read_body
from gemma3_export.serve.errors import ApiError, ClientGoneError, to_api_error
from gemma3_export.serve.gate import Gate, RequestLog, error_response
from gemma3_export.serve.metrics import CONTENT_TYPE, ServerMetrics
from gemma3_export.serve.openapi import describe
from gemma3_export.serve.requests import (
    Asked,
    ChatRequest,
    CompletionRequest,
    check_chat,
    check_completion,
    decode,
)
from gemma3_export.serve.responses import Writer, event
from gemma3_export.serve.running import RunningRequest, warm_up_tokenizer, with_tool_prompt
from gemma3_export.serve.settings import ServeOptions

__all__ = ["LAST_EVENT_S", "Service", "create_app"]

LAST_EVENT_S = 1.0  # for a client that has stopped reading
PLAYGROUND = Path(__file__).parent / "playground"
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground.css": ("playground.css", "text/css; charset=utf-8"),
    "/playground.js": ("playground.js", "text/javascript; charset=utf-8"),
}


class Service:
    """What the endpoints share.

    Args:
        engine: generates; the caller closes it.
        options: limits, and the names that clients use.
        metrics: counts what is answered.
    """

    def __init__(self, engine: Engine, options: ServeOptions, metrics: ServerMetrics) -> None:
        self.engine, self.options, self.metrics = engine, options, metrics
        self.created = int(time.time())

    async def answer(self, request: Request, read: Callable[[bytes], Asked]) -> Response:
        """Read a request, and return its answer or its stream.

        Raises:
            ApiError: the request is invalid, or there is no room for it.
            Gemma3ExportError: the same, or it failed.
            ClientGoneError: nobody waits for the answer.
        """
        body = await read_body(request, self.options)
        asked = with_tool_prompt(self.engine, read(body))
        deadline = asyncio.get_running_loop().time() + self.options.request_s
        running = await asyncio.to_thread(RunningRequest, self.engine, asked)
        job = _Job(self, running, request.state.log, deadline)
        if asked.streams:
            return job
        return await job.whole(request.receive)

    def model_json(self) -> dict[str, Any]:
        """Return the description of the model, with how many tokens a request can have."""
        return {
            "id": self.options.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "gemma3-export",
            "max_model_len": self.engine.max_request_tokens,
        }

    def require_model(self, name: str | None) -> None:
        """Check that a request asks for the model that is served.

        Raises:
            ApiError: it asks for another one.
        """
        if name not in (None, self.options.model_name):
            raise ApiError(
                404,
                f"there is no model {name!r:.80}; this server has {self.options.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def require_engine(self) -> None:
        """Check that the engine runs.

        Raises:
            ApiError: the engine is closing, closed or broken.
        """
        if not self.engine.is_open:
            raise ApiError(503, "the engine has stopped; restart the server", code="not_ready")


class _Job(Response):
    """A request that runs: sent as a stream, or collected by :meth:`whole`."""

    def __init__(
        self, service: Service, running: RunningRequest, log: RequestLog, deadline: float
    ) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._service, self._running, self._log = service, running, log
        self._deadline = deadline
        self._started = time.perf_counter()
        options = service.options
        self._writer = Writer(running, options.model_name, service.engine.model.tokenizer)

    async def whole(self, receive: Receive) -> Response:
        """Wait for all choices, and return them."""
        try:
            async with (
                on_disconnect(receive, self._running.give_up),
                asyncio.timeout_at(self._deadline),
            ):
                completions = await self._running.completions()
        finally:
            self._finish()
        return JSONResponse(self._writer.answer(completions))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer as it is generated; a failure becomes the last event."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async with (
                on_disconnect(receive, self._running.give_up),
                asyncio.timeout_at(self._deadline),
                aclosing(self._writer.stream()) as chunks,
            ):
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    # with many tokens ready, nothing above waits, and others must have their turn
                    await asyncio.sleep(0)
        except ClientGoneError:
            raise
        except Exception as error:
            self._log.facts["error"] = str(error)[:200]
            last = event(to_api_error(error).to_json())
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_EVENT_S):
                    await send({"type": "http.response.body", "body": last, "more_body": True})
        finally:
            self._finish()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _finish(self) -> None:
        """Cancel what still runs, and write down what the request took."""
        self._running.cancel()
        completions = [choice.stream.completion for choice in self._running.choices]
        usage = self._writer.usage(completions)
        self._log.facts |= {
            "stream": self._running.asked.streams,
            "choices": len(completions),
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish_reasons": sorted({each.finish_reason for each in completions}),
        }
        self._service.metrics.observe(completions, time.perf_counter() - self._started)


def create_app(engine: Engine, options: ServeOptions, metrics: ServerMetrics | None = None) -> Gate:
    """Return the ASGI app of a server, ready for its first request if the engine is warm.

    Args:
        engine: generates; the caller closes it.
        options: limits, and the names that clients use.
        metrics: counts what is answered; None is metrics of this process alone.
    """
    if metrics is None:
        metrics = ServerMetrics(engine, {"model_name": options.model_name})
    if engine.options.warm_up:
        warm_up_tokenizer(engine)
    service = Service(engine, options, metrics)
    app = FastAPI(
        title="gemma3-export",
        version=__version__,
        docs_url=None,  # they would load scripts from another site
        redoc_url=None,
        exception_handlers={
            ApiError: _on_error,
            Gemma3ExportError: _on_error,
            RecursionError: _on_error,
            TimeoutError: _on_error,
            HTTPException: _on_http_error,
        },
    )
    _add_api(app, service)
    _add_pages(app, service)
    app.openapi = cache(partial(describe, app, options))  # type: ignore[method-assign]
    return Gate(app, options, service.metrics.count_response, partial(_find_route, app))


def _find_route(app: FastAPI, scope: Scope) -> BaseRoute | None:
    return next((each for each in app.routes if each.matches(scope)[0] != Match.NONE), None)


def _add_api(app: FastAPI, service: Service) -> None:
    limits = service.options

    def read_completion(body: bytes) -> Asked:
        asked = decode(body, CompletionRequest)
        service.require_model(asked.model)
        return check_completion(asked, limits)

    def read_chat(body: bytes) -> Asked:
        asked = decode(body, ChatRequest)
        service.require_model(asked.model)
        return check_chat(asked, limits)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue a prompt."""
        return await service.answer(request, read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await service.answer(request, read_chat)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """List the model."""
        return JSONResponse({"object": "list", "data": [service.model_json()]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> JSONResponse:
        """Describe the model."""
        service.require_model(model_id)
        return JSONResponse(service.model_json())


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Say that the engine runs, also while it drains; if it does not, only a restart helps."""
        service.require_engine()
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Say that requests are accepted; the gate answers while the server drains."""
        service.require_engine()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        return Response(await service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    for path, (name, kind) in PAGES.items():
        app.add_route(path, _page((PLAYGROUND / name).read_bytes(), kind), include_in_schema=False)


def _page(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that sends a file of the playground."""

    async def page(request: Request) -> Response:
        return Response(content, headers={"content-type": kind, "cache-control": "no-cache"})

    return page


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(to_api_error(error, Asked.FIELDS))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"there is no {request.url.path:.80}; the API is below /v1"
    else:
        message = f"{request.method} {request.url.path:.80}: {error.detail}"
    answer = error_response(ApiError(error.status_code, message))
    answer.headers.update(error.headers or {})
    return answer
