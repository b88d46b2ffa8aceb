"""What clients may ask for: the fields of the OpenAI API that are supported, and a few more.

msgspec checks types, so that a bool is not taken for a number. Every field is handled, listed as
harmless and ignored, or rejected by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from gemma3_export.api.options import GenerateOptions
from gemma3_export.api.prompts import Prompt
from gemma3_export.errors import InputError
from gemma3_export.limits import TOKEN_ID, shown
from gemma3_export.records import is_deeper
from gemma3_export.runtimes.structured.function_calls import CHOICES
from gemma3_export.serve.errors import ApiError
from gemma3_export.serve.settings import ServeOptions
from gemma3_export.tokenizer import ChatMessage

__all__ = [
    "MAX_LOGPROBS",
    "Asked",
    "ChatRequest",
    "CompletionRequest",
    "Strict",
    "check_chat",
    "check_completion",
    "convert",
    "decode",
    "decode_json",
]

MAX_DEPTH = 64  # of a request's JSON; schemas of tools are the deepest
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16  # of completions, as in OpenAI's API
UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<field>.*)`", re.DOTALL)
PLACE = re.compile(r" - at `\$\.?(?P<place>.*)`$", re.DOTALL)
Request = TypeVar("Request", bound="SharedFields")


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object whose keys are all known."""


class StreamOptions(Strict):
    """What a stream has besides its text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted and ignored, as nothing is obfuscated


class JsonSchema(Strict):
    """The schema of a ``response_format``."""

    name: str = ""
    description: str | None = None
    schema: dict[str, Any] = {}
    strict: bool | None = None  # the schema is always enforced


class ResponseFormat(Strict):
    """Which texts may be generated."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SharedFields(Strict):
    """The fields that both endpoints have."""

    model: str | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = None
    # Accepted and ignored: they do not change an answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(SharedFields, kw_only=True):
    """The body of ``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    allow_control_tokens: bool | None = None
    # Only their defaults are accepted.
    best_of: int | None = None
    suffix: str | None = None


class ContentPart(msgspec.Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(Strict):
    """The function of a call: its name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Parts of OpenAI's answers that clients send back; they are empty in ours.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class ChosenFunction(Strict):
    """The name of a function."""

    name: str


class FunctionChoice(Strict):
    """The function that must be called."""

    function: ChosenFunction
    type: Literal["function"] = "function"


class ChatRequest(SharedFields, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request whose fields have been checked.

    Args:
        prompts: one or more.
        options: how to generate each choice.
        choices: of each prompt.
        max_tokens: new tokens of a choice; None is what the context and the server allow.
        is_chat: whether the prompt is a conversation.
        echo: whether the text of a prompt is part of the answer.
        max_calls: of functions in an answer; None is any number. What follows is left out.
        streams: whether the answer is a stream of events.
        reports_usage: whether a stream ends with its usage.
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset(
        (*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__)
    )

    prompts: Sequence[Prompt]
    options: GenerateOptions
    choices: int
    max_tokens: int | None
    is_chat: bool
    echo: bool = False
    max_calls: int | None = None
    streams: bool = False
    reports_usage: bool = False

    @property
    def reports_logprobs(self) -> bool:
        """Whether choices have log-probabilities."""
        return self.options.logprobs is not None


def decode(body: bytes, kind: type[Request]) -> Request:
    """Read the body of a request.

    Raises:
        ApiError: it is not JSON, nested too deeply, or a field is missing, unknown or of another
            type.
    """
    return convert(decode_json(body, "the body"), kind)


def decode_json(body: bytes, what: str) -> Any:
    """Return parsed JSON of limited depth; ``what`` is its name for messages.

    Raises:
        ApiError: it is not JSON, or nested too deeply.
    """
    try:
        data = msgspec.json.decode(body)
        if is_deeper(data, MAX_DEPTH):
            raise RecursionError
        return data
    except RecursionError:
        raise ApiError(
            400, f"{what} has more than {MAX_DEPTH} levels of nesting; use fewer"
        ) from None
    except ValueError as error:  # msgspec's errors, and bytes that are not UTF-8
        raise ApiError(400, f"{what} is not valid JSON: {error!s:.200}") from error


def convert(data: Any, kind: type[Request], *, strict: bool = True) -> Request:
    """Return parsed JSON as a request.

    Args:
        data: the parsed JSON.
        kind: of the request.
        strict: do not take the text ``"0.5"`` for a number.

    Raises:
        ApiError: a field is missing, unknown or of another type.
    """
    try:
        return msgspec.convert(data, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error


def _invalid(message: str) -> ApiError:
    match = PLACE.search(message)
    place = match["place"] if match else ""
    what = message[: match.start()] if match else message
    if unknown := UNKNOWN_FIELD.fullmatch(what):
        name = f"{place}.{unknown['field']}" if place else unknown["field"]
        return ApiError(400, f"{name:.80} is not supported; leave it out", param=f"{name:.80}")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        name = f"{place}.{missing[1]}" if place else missing[1]
        return ApiError(400, f"{name} is missing", param=name)
    if not place:
        return ApiError(400, "the body must be a JSON object")
    return ApiError(400, f"{place:.80}: {what:.200}", param=f"{place:.80}")


def check_completion(asked: CompletionRequest, limits: ServeOptions) -> Asked:
    """Return a completion request as prompts and options.

    Raises:
        ApiError: a value is out of range, or a field is not supported.
        InputError: as :class:`GenerateOptions`.
    """
    prompts = _prompts(asked.prompt)
    if asked.best_of not in (None, 1):
        raise _unsupported("best_of")
    if asked.suffix is not None:
        raise _unsupported("suffix")
    if asked.logprobs is not None:
        _require("logprobs", asked.logprobs, 0, MAX_LOGPROBS)
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    _require("max_tokens", max_tokens, 0, limits.max_tokens)
    options = _options(
        asked,
        limits,
        len(prompts),
        max_new_tokens=max(1, max_tokens),
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
        allow_control_tokens=bool(asked.allow_control_tokens),
    )
    return Asked(
        prompts=prompts,
        options=options,
        choices=asked.n or 1,
        max_tokens=max_tokens,
        is_chat=False,
        echo=bool(asked.echo),
        streams=bool(asked.stream),
        reports_usage=_reports_usage(asked),
    )


def check_chat(asked: ChatRequest, limits: ServeOptions) -> Asked:
    """Return a chat request as a conversation and options.

    Raises:
        ApiError: a value is out of range, or a field is not supported.
        InputError: as :class:`GenerateOptions`.
    """
    if not asked.messages:
        raise ApiError(400, "messages is empty; give at least one message", param="messages")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if asked.top_logprobs is not None:
        _require("top_logprobs", asked.top_logprobs, 0, MAX_LOGPROBS)
    given = {
        name: getattr(asked, name)
        for name in ("max_completion_tokens", "max_tokens")
        if getattr(asked, name) is not None
    }
    if len(given) > 1:
        raise ApiError(
            400, "max_tokens and max_completion_tokens mean the same; leave one of them out"
        )
    for name, value in given.items():
        _require(name, value, 1, limits.max_tokens)
    max_tokens = next(iter(given.values()), None)
    tools = _tools(asked)
    options = _options(
        asked,
        limits,
        1,
        max_new_tokens=max_tokens or limits.max_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        tools=tools,
        tool_choice=_tool_choice(asked),
    )
    return Asked(
        prompts=[_conversation(asked.messages)],
        options=options,
        choices=asked.n or 1,
        max_tokens=max_tokens,
        is_chat=True,
        max_calls=1 if asked.parallel_tool_calls is False else None,
        streams=bool(asked.stream),
        reports_usage=_reports_usage(asked),
    )


def _options(
    asked: SharedFields, limits: ServeOptions, prompts: int, **more: Any
) -> GenerateOptions:
    """Return the options of a choice; sampling is OpenAI's by default, which is not greedy."""
    if asked.n is not None:
        _require("n", asked.n, 1, limits.max_choices)
    if (asked.n or 1) * prompts > limits.max_choices:
        raise ApiError(
            400,
            f"the request asks for {(asked.n or 1) * prompts} choices, and this server allows "
            f"{limits.max_choices}; send several requests",
            param="n",
        )
    schema, regex = None, asked.regex
    wanted = asked.response_format
    if wanted is not None and wanted.type == "json_object":
        schema = {"type": "object"}
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ApiError(400, "response_format.json_schema is missing", param="response_format")
        schema = wanted.json_schema.schema
    return GenerateOptions(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        logit_bias=_logit_bias(asked.logit_bias),
        seed=asked.seed,
        stop=_stops(asked.stop, limits),
        ignore_eos=bool(asked.ignore_eos),
        json_schema=schema,
        regex=regex,
        **more,
    )


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    """Return biases by token id; in JSON, keys are texts.

    Raises:
        InputError: one is not a token id, or appears twice in different spellings.
    """
    found: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not TOKEN_ID.fullmatch(key):
            raise InputError(f"logit_bias has the key {shown(key)}, which is not a token id")
        if int(key) in found:
            raise InputError(f"logit_bias has token {int(key)} twice; leave one of them out")
        found[int(key)] = value
    return found or None


def _prompts(prompt: str | list[Any]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        what = "is empty" if not kinds else "mixes texts, token ids and lists"
        raise ApiError(
            400,
            f"prompt {what}; give a text, a list of texts, token ids, or a list of lists of them",
            param="prompt",
        )
    return [prompt] if kinds == {int} else list(prompt)


def _stops(stop: str | list[str] | None, limits: ServeOptions) -> tuple[str, ...]:
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > limits.max_stops:
        raise ApiError(
            400,
            f"stop has {len(texts)} texts; at most {limits.max_stops} may be",
            param="stop",
        )
    for text in texts:
        if not 1 <= len(text) <= limits.max_stop_characters:
            raise ApiError(
                400,
                f"a text in stop has {len(text)} characters; it must have 1 to "
                f"{limits.max_stop_characters}",
                param="stop",
            )
    return texts


def _tools(asked: ChatRequest) -> list[dict[str, Any]] | None:
    """Return the tools that the model may call; None if there are none."""
    for index, tool in enumerate(asked.tools or ()):
        function = tool.get("function")
        is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if tool.get("type") != "function" or not is_named:
            raise ApiError(
                400,
                f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}',
                param="tools",
            )
    return None if asked.tool_choice == "none" else asked.tools or None


def _tool_choice(asked: ChatRequest) -> str | None:
    """Return which calls the answer must have; None leaves that to the model."""
    if isinstance(asked.tool_choice, FunctionChoice):
        name = asked.tool_choice.function.name
        if name in CHOICES:
            raise ApiError(
                400,
                f"tool_choice names the function {name!r}, which is also the name of a choice; "
                "rename the function",
                param="tool_choice",
            )
        return name
    return "required" if asked.tool_choice == "required" else None


def _conversation(messages: Sequence[Message]) -> list[ChatMessage]:
    """Return messages as chat templates take them: calls as objects, and their answers by name."""
    names: dict[str, str] = {}
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        made = ChatMessage(role=message.role)
        if message.content is not None:
            made["content"] = _text(message.content, where)
        if message.name is not None:
            made["name"] = message.name
        if message.role == "tool" and message.name is None:
            made["name"] = _called(names, message.tool_call_id, where)
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            made["tool_calls"] = [_call(call, where) for call in message.tool_calls]
        elif message.content is None:
            raise ApiError(400, f"{where} has no content", param=where)
        found.append(made)
    return found


def _text(content: str | list[ContentPart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.type != "text" or part.text is None:
            raise ApiError(
                400,
                f"{where} has a part of type {shown(part.type)}; only text is supported",
                param=where,
            )
        texts.append(part.text)
    return "".join(texts)


def _called(names: dict[str, str], call_id: str | None, where: str) -> str:
    if call_id not in names:
        raise ApiError(
            400,
            f"{where}.tool_call_id is {shown(call_id)}, which no call before it has",
            param=where,
        )
    return names[call_id]


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
        is_legal = isinstance(arguments, dict) and not is_deeper(arguments, MAX_DEPTH)
    except (ValueError, RecursionError):
        is_legal = False
    if not is_legal:
        raise ApiError(
            400, f"{where}: the arguments of a call must be a JSON object, as text", param=where
        )
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _reports_usage(asked: SharedFields) -> bool:
    if asked.stream_options is None:
        return False
    if not asked.stream:
        raise ApiError(
            400, "stream_options needs stream to be true; leave it out", param="stream_options"
        )
    return asked.stream_options.include_usage


def _require(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ApiError(
            400, f"{name} is {shown(value)}; it must be from {least} to {most}", param=name
        )


def _unsupported(name: str) -> ApiError:
    return ApiError(400, f"{name} is not supported; leave it out", param=name)
