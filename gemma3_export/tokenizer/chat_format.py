"""Encode conversations with a tokenizer's chat templates.

The text of a message may spell a control token and so pretend to end its turn. In a rendered string
that is indistinguishable from the control token, so such text is marked with private characters
before the template renders it, and encoded as plain text afterwards. A conversation that spells
none is encoded exactly as transformers does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from gemma3_export.errors import InputError
from gemma3_export.tokenizer.chat import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    START_OF_TURN,
    ChatMessage,
    check_conversation,
)
from gemma3_export.tokenizer.function_calls import (
    CALL_TOKENS,
    FunctionCall,
    read_function_calls,
)
from gemma3_export.tokenizer.settings import TokenizerSettings
from gemma3_export.tokenizer.template import (
    ChatTemplate,
    RenderedChat,
    plain_messages,
    plain_value,
    unused_characters,
)

__all__ = ["FUNCTION_PROMPT", "ChatFormat", "ChatOptions", "EncodedChat"]

# FunctionGemma stops here, for the program to call the function and write its response.
FUNCTION_RESPONSE = "<start_function_response>"
# FunctionGemma was trained to call functions after this text, and answers in prose without it.
FUNCTION_PROMPT = "You are a model that can do function calling with the following functions"
PROBE = "Qxzanswerzxq"  # no template's own text
_IDENTIFIER = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """What goes into a chat template besides the messages.

    Args:
        tools: JSON schemas of the functions that the model may call.
        documents: documents with a title and a text.
        template: the name of one of several templates; None chooses as transformers does.
        variables: other variables of the template, such as ``enable_thinking``.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChat:
    """The tokens of a conversation; ``is_answer`` is True for those of the assistant's answers.

    An answer includes the token that ends its turn.
    """

    token_ids: list[int]
    is_answer: list[bool]


class Encoder(Protocol):
    """What a chat format needs of a tokenizer."""

    settings: TokenizerSettings

    @property
    def is_gemma(self) -> bool:
        """Return True if it has Gemma's turn tokens."""

    @property
    def control_token_ids(self) -> frozenset[int]:
        """Return the ids that ordinary text never yields."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token."""

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Return the ids that decoding skips."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token."""

    def token_text(self, token_id: int) -> str:
        """Return the text of a token."""

    def special_tokens(self) -> dict[str, str]:
        """Return the special tokens by name."""

    def require_shorter(self, characters: int, most: int) -> None:
        """Check that a text of this length may have so few tokens."""

    def encode_with_offsets(
        self, text: str, *, allow_control_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and the [start, end) of each in the text."""


class ChatFormat:
    """The chat templates of a tokenizer; without any, Gemma's own format.

    Args:
        tokenizer: encodes, and has the templates among its settings.
    """

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, ChatTemplate] = {}

    @property
    def exists(self) -> bool:
        """Whether conversations can be encoded at all."""
        return bool(self._tokenizer.settings.templates) or self._tokenizer.is_gemma

    @cached_property
    def literals(self) -> str:
        """The text that the templates write themselves, separated by null characters."""
        texts = []
        for source in self._sources():
            try:
                texts.append(self._of(source).literals)
            except InputError:  # reported when the template is used
                continue
        return "\0".join(texts)

    @property
    def calls_functions(self) -> bool:
        """Whether the model calls functions as FunctionGemma does."""
        return all(
            token in self.literals and self._tokenizer.token_id(token) is not None
            for token in CALL_TOKENS
        )

    def call_token_ids(self) -> tuple[int, ...]:
        """Return the ids of the tokens that start a call, end it, and surround a text in it.

        Raises:
            InputError: the model does not call functions as FunctionGemma does.
        """
        if not self.calls_functions:
            raise InputError(
                "only FunctionGemma's calls can be constrained to schemas, and this model's "
                f"template writes no {CALL_TOKENS[0]}; leave tool_choice out"
            )
        ids = (self._tokenizer.token_id(token) for token in CALL_TOKENS)
        return tuple(token_id for token_id in ids if token_id is not None)

    def opening(
        self, system: str | None, tools: Sequence[Mapping[str, Any]] | None
    ) -> list[ChatMessage]:
        """Return what comes before the first user message.

        With tools and without a system message, FunctionGemma needs a certain text.
        """
        if system is not None:
            return [ChatMessage(role="system", content=system)]
        if tools and self.calls_functions:
            return [ChatMessage(role="developer", content=FUNCTION_PROMPT)]
        return []

    def read_answer(self, token_ids: Sequence[int]) -> tuple[str, list[FunctionCall]]:
        """Return the text of an answer before its function calls, and the calls.

        Args:
            token_ids: what the model generated, with or without the token that ended it.

        Raises:
            InputError: a call is malformed or incomplete, or in a format that is not read.
        """
        tokenizer = self._tokenizer
        if not self.calls_functions:
            raise InputError(
                "only FunctionGemma's calls are read, and this model's template writes no "
                f"{CALL_TOKENS[0]}; read the calls from the answer's text"
            )
        skipped = {*self.end_token_ids, *tokenizer.special_token_ids}
        skipped -= {tokenizer.token_id(token) for token in CALL_TOKENS}
        return read_function_calls(
            token_ids,
            tokenizer.token_id,
            lambda token_id: b"" if token_id in skipped else tokenizer.token_bytes(token_id),
        )

    def template(self, options: ChatOptions | None = None) -> ChatTemplate:
        """Return the template for a conversation.

        Raises:
            InputError: there is none, or it does not use the tools or documents that are given.
        """
        options = options or ChatOptions()
        has_tools = options.tools is not None
        source = self._tokenizer.settings.template(options.template, has_tools=has_tools)
        if source is None:
            if not self._tokenizer.is_gemma:
                raise InputError(
                    f"this tokenizer has no chat template, and lacks <bos>, {START_OF_TURN} or "
                    f"{END_OF_TURN}, so it cannot encode a conversation; use plain text or the "
                    "tokenizer of an instruction-tuned model"
                )
            source = CHAT_TEMPLATE
        for name, given in (("tools", options.tools), ("documents", options.documents)):
            if given is not None and name not in source:
                raise InputError(
                    f"the chat template does not use {name}, so the model would not see them; "
                    f"leave them out, or use a model whose template has {name}"
                )
        return self._of(source)

    def render(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Render a conversation to text, which does not show what is spelled and what is control.

        To get token ids, use :meth:`encode`.

        Raises:
            InputError: see :meth:`encode`.
        """
        template, given = self._prepare(messages, options)
        return template.render(messages, add_generation_prompt=add_generation_prompt, **given)

    def encode(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions | None = None,
        *,
        add_generation_prompt: bool = True,
        most: int | None = None,
    ) -> list[int]:
        """Encode a conversation.

        Raises:
            InputError: the template is missing, or does not accept the conversation.
            TextTooLongError: its length alone shows that it has more than ``most`` tokens.
        """
        template, given = self._prepare(messages, options)
        marked = self._mark(messages, template, given)
        text = template.render(
            marked.messages, add_generation_prompt=add_generation_prompt, **marked.given
        )
        if most is not None:
            markers = sum(map(text.count, marked.markers))
            self._tokenizer.require_shorter(len(text) - markers, most)
        return self._encode(text, marked.markers)[0]

    def encode_answers(
        self, messages: Sequence[ChatMessage], options: ChatOptions | None = None
    ) -> EncodedChat:
        """Encode a conversation, and say which tokens are the assistant's.

        Raises:
            InputError: see :meth:`encode` and :meth:`ChatTemplate.render_answers`.
        """
        template, given = self._prepare(messages, options)
        marked = self._mark(messages, template, given)
        rendered = template.render_answers(marked.messages, **marked.given)
        ids, offsets = self._encode(rendered.text, marked.markers)
        answers = _without_markers(rendered, marked.markers)
        is_answer = [False] * len(ids)
        for index, (start, end) in enumerate(offsets):
            at = bisect_left(answers, (end, 0)) - 1  # the last answer that starts before the end
            is_answer[index] = at >= 0 and start < answers[at][1] and end > answers[at][0]
        return EncodedChat(token_ids=ids, is_answer=is_answer)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, found by rendering one with each template."""
        found: dict[int, None] = {}
        for source in self._sources():
            end = self._end_of_turn(self._of(source))
            if end is not None and (token_id := self._tokenizer.token_id(end)) is not None:
                found[token_id] = None
        response = self._tokenizer.token_id(FUNCTION_RESPONSE)
        if response is not None and FUNCTION_RESPONSE in self.literals:
            found[response] = None
        return tuple(found)

    def _end_of_turn(self, template: ChatTemplate) -> str | None:
        """Return the control token after an answer, or None if text or nothing follows."""
        variables = self._tokenizer.special_tokens()
        for messages in _probes():
            try:
                text = template.render(messages, add_generation_prompt=False, variables=variables)
            except InputError:  # a template may accept only some forms
                continue
            _, found, rest = text.rpartition(PROBE)
            if found and (match := self._control.match(rest.lstrip())):
                return match[0]
        return None

    def _sources(self) -> list[str]:
        templates = self._tokenizer.settings.templates
        if templates:
            return list(dict.fromkeys(templates.values()))
        return [CHAT_TEMPLATE] if self._tokenizer.is_gemma else []

    def _of(self, source: str) -> ChatTemplate:
        return self._templates.setdefault(source, ChatTemplate(source))

    def _prepare(
        self, messages: Sequence[ChatMessage], options: ChatOptions | None
    ) -> tuple[ChatTemplate, dict[str, Any]]:
        options = options or ChatOptions()
        template = self.template(options)
        if template.source == CHAT_TEMPLATE:
            check_conversation(messages)  # its errors say more than the template's
        variables = {**self._tokenizer.special_tokens(), **options.variables}
        given = {"tools": options.tools, "documents": options.documents, "variables": variables}
        return template, given

    @cached_property
    def _control_tokens(self) -> list[str]:
        """The texts of the control tokens, longest first."""
        ids = self._tokenizer.control_token_ids
        texts = {self._tokenizer.token_text(token_id) for token_id in ids}
        return sorted(texts - {""}, key=lambda text: (-len(text), text))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._control_tokens)) or "(?!)")

    @cached_property
    def _edges(self) -> tuple[frozenset[str], frozenset[str]]:
        """All beginnings and all ends of control tokens."""
        cuts = [(text, at) for text in self._control_tokens for at in range(1, len(text))]
        return frozenset(text[:at] for text, at in cuts), frozenset(text[at:] for text, at in cuts)

    def _mark(
        self, messages: Sequence[ChatMessage], template: ChatTemplate, given: dict[str, Any]
    ) -> _Marked:
        """Mark control tokens, and beginnings and ends of them, in everything that is rendered."""
        chat = plain_messages(messages)
        inputs = {
            "messages": chat,
            "tools": plain_value(given["tools"], "tools"),
            "documents": plain_value(given["documents"], "documents"),
        }
        if not any(self._spells_control(text) for text in _strings(inputs)):
            return _Marked(messages=chat, given=given, markers="")
        taken = (inputs, template.source, given["variables"])
        start, end = unused_characters(taken, 2)
        marked = self._marked(inputs, start, end)
        return _Marked(
            messages=marked["messages"],
            given={
                "tools": marked["tools"],
                "documents": marked["documents"],
                "variables": given["variables"],
                "unescaped": start + end,
            },
            markers=start + end,
        )

    def _spells_control(self, text: str) -> bool:
        return bool(self._control.search(text)) or any(self._at_edge(text))

    def _at_edge(self, text: str) -> tuple[bool, bool]:
        """Return whether a text may complete a control token at its start, and at its end."""
        beginnings, ends = self._edges
        longest = min(len(text), len(self._control_tokens[0]) if self._control_tokens else 0)
        sizes = range(1, longest + 1)
        return (
            any(text[:size] in ends for size in sizes),
            any(text[-size:] in beginnings for size in sizes),
        )

    def _marked(self, value: Any, start: str, end: str) -> Any:
        if isinstance(value, str):
            completes, begins = self._at_edge(value)
            text = self._control.sub(rf"{start}\g<0>{end}", value)
            return f"{end * completes}{text}{end * begins}"
        if isinstance(value, Mapping):
            return {
                self._marked(key, start, end): (
                    item if _is_name(key, item) else self._marked(item, start, end)
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self._marked(item, start, end) for item in value)
        return value

    def _encode(self, text: str, markers: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode rendered text; offsets are those in the text without markers."""
        if not markers:
            return self._tokenizer.encode_with_offsets(text)
        start, end = markers[0], markers[1]
        control = self._control.pattern
        pattern = re.compile(f"{start}(?P<literal>{control}){end}|[{start}{end}]|{control}")
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0  # in the text without markers
        pending: list[str] = []

        def flush() -> None:
            nonlocal position
            plain = "".join(pending)
            pending.clear()
            encoded, at = self._tokenizer.encode_with_offsets(plain, allow_control_tokens=False)
            ids.extend(encoded)
            offsets.extend((position + first, position + last) for first, last in at)
            position += len(plain)

        last = 0
        # The tokenizer first splits text at control tokens, so encoding the parts separately is
        # exact.
        for match in pattern.finditer(text):
            pending.append(text[last : match.start()])
            last = match.end()
            if (literal := match["literal"]) is not None:
                pending.append(literal)
            elif match[0] not in markers:
                flush()
                token_id = self._tokenizer.token_id(match[0])
                assert token_id is not None
                ids.append(token_id)
                offsets.append((position, position + len(match[0])))
                position += len(match[0])
        pending.append(text[last:])
        flush()
        return ids, offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class _Marked:
    """The inputs of a template with markers; ``markers`` is empty if there was nothing to mark."""

    messages: Sequence[Any]
    given: dict[str, Any]
    markers: str


def _probes() -> Iterator[list[dict[str, Any]]]:
    """Yield conversations with an answer, in the forms that templates accept."""
    for shape in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        user = {"role": "user", "content": shape("Question")}
        answer = {"role": "assistant", "content": shape(PROBE)}
        yield [user, answer]
        yield [user, answer, user]
        yield [{"role": "system", "content": shape("Answer.")}, user, answer]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            if not _is_name(key, item):
                yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _is_name(key: str, value: object) -> bool:
    """Return whether a value is one that templates compare rather than write."""
    return key in ("role", "type") and bool(isinstance(value, str) and _IDENTIFIER.fullmatch(value))


def _without_markers(rendered: RenderedChat, markers: str) -> list[tuple[int, int]]:
    """Return where the answers are in the text without markers."""
    at = [index for index, character in enumerate(rendered.text) if character in markers]
    return [
        (start - bisect_left(at, start), end - bisect_left(at, end))
        for start, end in rendered.answers
    ]
