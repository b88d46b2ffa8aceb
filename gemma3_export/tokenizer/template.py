"""Render conversations with a model's own chat template, as transformers does.

A template is a Jinja program that turns messages, and the tools and documents that go with them,
into text. ``sandbox.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jinja2.environment import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.tokenizer.sandbox import Rendering, compile_template, literal_text, rendering

__all__ = [
    "ChatTemplate",
    "RenderedChat",
    "plain_messages",
    "plain_value",
    "unused_characters",
]

# Fields under which a model's reasoning is passed; the first is what most templates read.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
MAX_DEPTH = 64  # of nested lists and mappings in messages and tools
ASSISTANT_ROLES = ("assistant", "model")
Message = Mapping[str, Any]
Messages = Sequence[Message]


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """The text of a conversation, and which parts of it the model is to generate.

    Attributes:
        text: the rendered conversation.
        answers: [start, end) of the assistant's answers in ``text``, in characters, in order. An
            answer ends with the tokens that end its turn.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A chat template; threads can share it.

    Args:
        source: the Jinja source.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    @cached_property
    def literals(self) -> str:
        """The texts and string constants of the template, separated by null characters.

        Raises:
            InputError: the template cannot be parsed.
        """
        try:
            return literal_text(self.source)
        except Exception as error:
            raise _cannot_compile(error) from error

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks answers with ``{% generation %}``."""
        return "endgeneration" in self.source

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        unescaped: str = "",
    ) -> str:
        """Render a conversation.

        Args:
            messages: at least one message.
            tools: JSON schemas of the functions that the model may call.
            documents: documents with a title and a text.
            add_generation_prompt: end with the beginning of the assistant's turn.
            variables: other variables, such as ``bos_token``.
            unescaped: characters that ``tojson`` must not escape.

        Raises:
            InputError: the template does not accept the conversation, has an error or takes too
                much time or memory; or an argument is not plain data.
        """
        return self._run(
            plain_messages(messages),
            tools=_plain_list(tools, "tools"),
            documents=_plain_list(documents, "documents"),
            add_generation_prompt=add_generation_prompt,
            variables=variables,
            state=Rendering(escaped_markers=unescaped),
        )

    def render_answers(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        unescaped: str = "",
    ) -> RenderedChat:
        """Render a conversation and find the assistant's answers in it.

        A template says by ``{% generation %}`` where they are. For any other, the beginnings of the
        conversation are rendered, up to the prompt for each answer and up to its end.

        Raises:
            InputError: see :meth:`render`; or the template renders the beginning of a conversation
                differently from the whole, so that the answers cannot be found.
        """
        chat = plain_messages(messages)
        given: dict[str, Any] = {
            "tools": _plain_list(tools, "tools"),
            "documents": _plain_list(documents, "documents"),
            "variables": variables,
        }
        if self.marks_answers:
            taken = (chat, given["tools"], given["documents"], self.source, unescaped)
            before, after = unused_characters(taken, 2)
            state = Rendering(answer_markers=(before, after), escaped_markers=unescaped)
            marked = self._run(chat, add_generation_prompt=False, state=state, **given)
            return _without_markers(marked, before, after)
        return self._render_prefixes(chat, unescaped, given)

    def _render_prefixes(
        self, chat: list[dict[str, Any]], unescaped: str, given: dict[str, Any]
    ) -> RenderedChat:
        def run(count: int, add_generation_prompt: bool) -> str:
            state = Rendering(escaped_markers=unescaped)
            return self._run(
                chat[:count], add_generation_prompt=add_generation_prompt, state=state, **given
            )

        text = run(len(chat), add_generation_prompt=False)
        answers = []
        for index, message in enumerate(chat):
            if message.get("role") not in ASSISTANT_ROLES:
                continue
            prompt = run(index, add_generation_prompt=True) if index else ""
            whole = run(index + 1, add_generation_prompt=False)
            if not (text.startswith(whole) and whole.startswith(prompt)):
                raise InputError(
                    f"message {index}: the chat template renders the beginning of this "
                    "conversation differently from the whole, so the assistant's answers cannot "
                    "be found; mark them in the template with {% generation %}, or train on one "
                    "answer per conversation"
                )
            # What follows the end of the turn, usually a newline, is not for the model to say.
            end = len(prompt) + len(whole[len(prompt) :].rstrip())
            answers.append((len(prompt), end))
        return RenderedChat(text=text, answers=tuple(answers))

    def _run(
        self,
        chat: list[dict[str, Any]],
        *,
        tools: Any,
        documents: Any,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
        state: Rendering,
    ) -> str:
        given = plain_value(dict(variables or {}), "the template's variables")
        try:
            compiled = _compiled(self.source)
        except Exception as error:
            raise _cannot_compile(error) from error
        # The compiled template runs here, and may fail in any way that a program can.
        try:
            with rendering(state):
                return compiled.render(
                    {
                        **given,
                        "messages": chat,
                        "tools": tools,
                        "documents": documents,
                        "add_generation_prompt": add_generation_prompt,
                    }
                )
        except Gemma3ExportError:
            raise
        except TemplateError as error:
            raise InputError(
                f"the chat template rejects this conversation: {_one_line(error)}"
            ) from error
        except RecursionError as error:
            raise InputError("the chat template recurses too deeply; use another one") from error
        except Exception as error:
            raise InputError(
                f"the chat template fails on this conversation ({type(error).__name__}: "
                f"{_one_line(error)}); change the messages or the template"
            ) from error


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Return messages as templates get them: plain data, no null fields, one name for reasoning.

    Raises:
        InputError: there are no messages, or they are not mappings with a role, or not plain data.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            f"a conversation must be a list of messages, not {type(messages).__name__}"
        )
    if not messages:
        raise InputError("the conversation is empty; give at least one user message")
    chat = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(
                f"message {index} is of type {type(message).__name__}; it must have a role and "
                "content"
            )
        plain = plain_value(dict(message), f"message {index}")
        plain = {key: value for key, value in plain.items() if value is not None}
        if not isinstance(plain.get("role"), str):
            raise InputError(
                f"message {index} has role {plain.get('role')!r:.80}; use system, developer, user, "
                "assistant or tool"
            )
        given = [plain[field] for field in REASONING_FIELDS if field in plain]
        if given:
            plain = {"thinking": given[0], **plain, "reasoning_content": given[0]}
        chat.append(plain)
    return chat


def plain_value(value: object, where: str, depth: int = 0) -> Any:
    """Copy a value that consists of text, numbers, True, False, None, lists and mappings.

    Other objects could have methods that a template must not call.

    Raises:
        InputError: there is another object, or it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise InputError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise InputError(f"{where} has the key {odd[0]!r:.60}; keys must be strings")
        return {str(key): plain_value(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        items = [plain_value(item, where, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise InputError(
        f"{where} holds an object of type {type(value).__name__}; use text, numbers, lists and "
        "mappings only"
    )


def unused_characters(values: object, count: int) -> list[str]:
    """Return ``count`` private-use characters that occur nowhere in ``values``.

    Raises:
        InputError: too few are unused.
    """
    used: set[str] = set()
    stack = [values]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            used.update(value)
        elif isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, Sequence):
            stack += value
    found = [character for code in range(0xE000, 0xF900) if (character := chr(code)) not in used]
    if len(found) < count:
        raise InputError("the text uses every private character of Unicode; remove some of them")
    return found[:count]


def _plain_list(values: object, name: str) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    is_list = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if not is_list or not all(isinstance(value, Mapping) for value in values):  # type: ignore[attr-defined]
        raise InputError(f"{name} must be a list of JSON objects, not {values!r:.60}")
    return [plain_value(value, name) for value in values]  # type: ignore[attr-defined]


def _without_markers(marked: str, before: str, after: str) -> RenderedChat:
    parts: list[str] = []
    answers: list[tuple[int, int]] = []
    length, start = 0, None
    for part in _split_keeping(marked, before + after):
        if part == before:
            start = length
        elif part == after:
            if start is not None:
                answers.append((start, length))
            start = None
        else:
            parts.append(part)
            length += len(part)
    return RenderedChat(text="".join(parts), answers=tuple(answers))


def _split_keeping(text: str, separators: str) -> list[str]:
    parts = [text]
    for separator in separators:
        parts = [
            piece
            for part in parts
            for number, between in enumerate(part.split(separator) if part != separator else [part])
            for piece in ([separator, between] if number else [between])
        ]
    return parts


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    return compile_template(source)


def _cannot_compile(error: Exception) -> InputError:
    line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
    return InputError(
        f"the chat template cannot be used: {reason}{line}; correct it, or give another tokenizer"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
