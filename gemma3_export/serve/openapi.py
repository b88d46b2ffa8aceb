"""The OpenAPI description of a server: what it takes, what it answers, and with which status.

The schemas of requests come from the types that read them. Those of answers are types that only
describe: :mod:`gemma3_export.serve.responses` writes them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gemma3_export.limits import TOKEN_ID
from gemma3_export.runtimes.generation.sampling import MAX_BIAS
from gemma3_export.serve.gate import PUBLIC
from gemma3_export.serve.metrics import CONTENT_TYPE
from gemma3_export.serve.requests import (
    MAX_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    Strict,
)
from gemma3_export.serve.settings import ServeOptions

__all__ = ["describe"]

REFERENCE = "#/components/schemas/{name}"


class PromptTokensDetails(Strict):
    """How many tokens of the prompts were cached."""

    cached_tokens: int


class Usage(Strict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(Strict):
    """Log-probabilities, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Strict):
    """A text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Strict):
    """The answer of ``POST /v1/completions``."""

    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TopLogprob(Strict):
    """The log-probability of a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The log-probability of a token that was generated, and of the most likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Strict):
    """Log-probabilities, one entry per token."""

    content: list[TokenLogprob]
    refusal: None


class AnsweredFunction(Strict):
    """A function, and its arguments as JSON text."""

    name: str
    arguments: str


class AnsweredCall(Strict):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(Strict):
    """The message that answers a conversation."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Strict):
    """An answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Strict):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Model(Strict):
    """The model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Strict):
    """The models, of which there is one."""

    object: Literal["list"]
    data: list[Model]


class Status(Strict):
    """The state of the server."""

    status: Literal["ok", "ready"]


class ErrorDetail(Strict):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Strict):
    """The answer to a request that fails."""

    error: ErrorDetail


ERRORS = {
    400: "The request is invalid.",
    401: "The API key is missing or wrong.",
    403: "The server has no key, and Host is not this machine.",
    404: "The model is unknown.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests are waiting.",
    501: "The server lacks a package that the request needs.",
    503: "The server is shutting down, or its engine has stopped.",
    504: "The answer took too long.",
}
BODY_ERRORS = (400, 404, 408, 413, 415, 429, 501, 503, 504)
STREAM: dict[str, Any] = {"text/event-stream": {}}  # a schema cannot describe its events
# By path: the types of body and answer, other kinds of answers, and errors besides the gate's.
ENDPOINTS: dict[str, tuple[type | None, type | None, dict[str, Any], tuple[int, ...]]] = {
    "/v1/completions": (CompletionRequest, Completion, STREAM, BODY_ERRORS),
    "/v1/chat/completions": (ChatRequest, ChatCompletion, STREAM, BODY_ERRORS),
    "/v1/models": (None, ModelList, {}, ()),
    "/v1/models/{model_id}": (None, Model, {}, (404,)),
    "/health": (None, Status, {}, (503,)),
    "/ready": (None, Status, {}, (503,)),
    "/metrics": (None, None, {CONTENT_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}, ()),
}


def describe(app: FastAPI, limits: ServeOptions) -> dict[str, Any]:
    """Return the OpenAPI description of ``app``.

    Args:
        app: its routes are described.
        limits: the ranges of fields, and whether there is a key.
    """
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    kinds = [each for pair in ENDPOINTS.values() for each in pair[:2] if each is not None]
    _, schemas = msgspec.json.schema_components([*kinds, Error], ref_template=REFERENCE)
    for kind in (CompletionRequest, ChatRequest):
        for field, rule in _restrictions(limits, kind).items():
            schemas[kind.__name__]["properties"][field] |= rule
    found["components"] = {"schemas": schemas}
    if limits.key is not None:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        body, answer, others, errors = ENDPOINTS[path]
        for operation in operations.values():
            content = dict(others)
            if answer is not None:
                content |= _json(answer)
            is_open = limits.key is None or path in PUBLIC
            gate = (403,) if limits.key is None else () if is_open else (401,)
            operation["responses"] = {
                "200": {"description": "The answer.", "content": content},
                **{
                    str(status): {"description": ERRORS[status], "content": _json(Error)}
                    for status in sorted((*errors, *gate))
                },
            }
            if body is not None:
                operation["requestBody"] = {"required": True, "content": _json(body)}
            if not is_open:
                operation["security"] = [{"key": []}]
    return found


def _json(kind: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=kind.__name__)}}}


def _restrictions(limits: ServeOptions, kind: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """Return what is checked of a body's fields besides their types."""
    number = {"minimum": 0}
    tokens = {"minimum": 0 if kind is CompletionRequest else 1, "maximum": limits.max_tokens}
    found: dict[str, dict[str, Any]] = {
        "n": {"minimum": 1, "maximum": limits.max_choices},
        "stop": {
            "maxItems": limits.max_stops,
            "minLength": 1,
            "maxLength": limits.max_stop_characters,
        },
        "seed": number,
        "temperature": number,
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": number,
        "min_p": {"minimum": 0, "maximum": 1},
        "repetition_penalty": {"exclusiveMinimum": 0},
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
        "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
        "messages": {"minItems": 1},
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "logit_bias": {
            "propertyNames": {"pattern": f"^{TOKEN_ID.pattern}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        },
        "best_of": {"enum": [None, 1]},
        "suffix": {"enum": [None]},
    }
    return {name: rule for name, rule in found.items() if name in kind.__struct_fields__}
