"""Errors as the OpenAI API reports them: a status, and an object that says what and why."""

from __future__ import annotations

import logging
from typing import Any

from gemma3_export.errors import (
    EngineClosedError,
    InputError,
    QueueFullError,
    UnavailableError,
)

__all__ = ["RETRY_AFTER_S", "ApiError", "ClientGoneError", "to_api_error"]

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
CODES = {
    401: "invalid_api_key",
    408: "body_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    503: "shutting_down",
    504: "request_timeout",
}


class ClientGoneError(Exception):
    """The client has closed its connection, so nobody reads the answer."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of the HTTP response.
        message: names the value and the remedy.
        param: the field of the request, if it is one field.
        code: what programs compare; None is the usual one of the status.
        closes: whether the connection must end, because the body was not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = CODES.get(status) if code is None else code
        self.closes = closes

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the response needs besides the usual ones."""
        found = {}
        if self.status in (429, 503):
            found["retry-after"] = str(RETRY_AFTER_S)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.closes:
            found["connection"] = "close"
        return found


def to_api_error(error: Exception, fields: frozenset[str] = frozenset()) -> ApiError:
    """Return how an error is reported to the client.

    Args:
        error: what was raised.
        fields: names of the request's fields; a message that begins with one is about it.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        first = str(error).partition(" ")[0]
        return ApiError(400, str(error), param=first if first in fields else None)
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply; use fewer levels")
    if isinstance(error, QueueFullError):
        return ApiError(429, "too many requests are waiting; try again later")
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is shutting down; try another one, or later")
    if isinstance(error, UnavailableError):
        return ApiError(501, str(error), code="not_installed")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took too long; ask for fewer tokens, or stream it")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the request failed; the server's log says why", code="internal_error")
