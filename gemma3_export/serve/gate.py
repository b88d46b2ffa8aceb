"""What every request passes: request ids, keys, draining, headers, logs and errors."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma3_export.serve.errors import ApiError, ClientGoneError, to_api_error
from gemma3_export.serve.settings import ServeOptions, is_loopback

__all__ = ["PUBLIC", "Gate", "JsonLines", "RequestLog", "error_response", "route_of"]

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# The page of the playground is public, and holds no secret: it asks for the key.
PUBLIC = ("/health", "/ready", "/", "/playground.css", "/playground.js")
QUIET = ("/health", "/ready", "/metrics")  # which machines poll
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(kw_only=True, slots=True)
class RequestLog:
    """What the log says about one request; prompts and answers are never part of it."""

    request_id: str
    facts: dict[str, Any] = field(default_factory=dict)


class Gate:
    """ASGI middleware around the whole app.

    Args:
        app: answers what passes.
        options: the key, and whether one is needed.
        count: called with route and status of each answered request.
        find_route: returns the route of a request that the app has not seen, or None.

    Attributes:
        active: requests that have not been answered yet.
        is_draining: whether requests for new text are rejected.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        count: Callable[[str, int], None],
        find_route: Callable[[Scope], Any] = lambda scope: None,
    ) -> None:
        self._app, self._options, self._count = app, options, count
        self._find_route = find_route
        self.active = 0
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        log = RequestLog(request_id=given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16))
        scope.setdefault("state", {})["log"] = log
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _mark(MutableHeaders(scope=message), log.request_id)
            await send(message)

        started = time.perf_counter()
        self.active += 1
        try:
            self._admit(scope, headers)
            await self._app(scope, receive, send_marked)
        except ClientGoneError:
            status = 499  # nginx's number; nobody receives it
        except Exception as error:
            if status:  # too late for another answer; uvicorn closes the connection
                raise
            await error_response(to_api_error(error))(scope, receive, send_marked)
        finally:
            self.active -= 1
            if "route" not in scope:  # the request has been rejected here
                scope["route"] = self._find_route(scope)
            self._count(route_of(scope), status)
            logger.log(
                logging.DEBUG if scope["path"] in QUIET else logging.INFO,
                "request",
                extra={
                    "facts": {
                        "request_id": log.request_id,
                        "client": (scope.get("client") or (None,))[0],
                        "method": scope["method"],
                        "path": scope["path"][:200],
                        "status": status,
                        "duration_ms": round((time.perf_counter() - started) * 1e3, 1),
                        **log.facts,
                    }
                },
            )

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Check the key and the host of a request.

        Raises:
            ApiError: it may not pass.
        """
        path, key = scope["path"], self._options.key
        # A page on another site can point its own name at this machine (DNS rebinding).
        if key is None and not is_loopback(_host_name(headers.get("host", ""))):
            raise ApiError(
                403,
                "without an API key, the server answers only to localhost; use that as the host",
                closes=True,
            )
        if key is not None and path not in PUBLIC:
            scheme, _, sent = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(sent.strip().encode(), key.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise ApiError(401, "send the key as Authorization: Bearer KEY", closes=True)
        if self.is_draining and (scope["method"] == "POST" or path == "/ready"):
            raise ApiError(503, "the server is shutting down; try another one", closes=True)


def error_response(error: ApiError) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse(error.to_json(), error.status, headers=error.headers)


def route_of(scope: Scope) -> str:
    """Return the route of a request; those that match none count as one."""
    return getattr(scope.get("route"), "path", "none")


def _host_name(host: str) -> str:
    """Return a Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _mark(headers: MutableHeaders, request_id: str) -> None:
    headers["x-request-id"] = request_id
    headers["x-content-type-options"] = "nosniff"
    headers["content-security-policy"] = CONTENT_SECURITY_POLICY
    headers["referrer-policy"] = "no-referrer"
    headers.setdefault("cache-control", "no-store")


class JsonLines(logging.Formatter):
    """Formats log records as JSON, one per line.

    Args:
        facts: what every line says.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self._facts = dict(facts)

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._facts,
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(**facts: Any) -> None:
    """Send the logs of the server, the engine and uvicorn to stderr as JSON lines.

    Args:
        facts: what every line says.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(facts))
    levels = {
        "gemma3_export": logging.INFO,
        "uvicorn.error": logging.WARNING,
        "asyncio": logging.ERROR,  # which warns of clients that leave
    }
    for name, level in levels.items():
        found = logging.getLogger(name)
        found.handlers, found.propagate = [handler], False
        found.setLevel(level)
