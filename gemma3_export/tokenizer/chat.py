"""Gemma's own chat format, for tokenizers that came without a chat template.

A conversation is a sequence of turns. A turn is ``<start_of_turn>``, the speaker's name, a newline,
the text, ``<end_of_turn>`` and a newline. There is no system speaker: a system message is prepended
to the first user message, with a blank line between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from gemma3_export.errors import InputError

__all__ = [
    "CHAT_TEMPLATE",
    "CONTROL_TOKENS",
    "END_OF_TURN",
    "START_OF_TURN",
    "ChatMessage",
    "check_conversation",
]

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
CONTROL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    START_OF_TURN,
    END_OF_TURN,
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)

# Unlike the official template, it uses all text parts of a system message, not just the first.
CHAT_TEMPLATE = """\
{%- macro plain(content, index, trimmed) -%}
  {%- if content is string -%}
    {{- content | trim if trimmed else content -}}
  {%- elif content is mapping or content is not iterable -%}
    {{- raise_exception('message ' ~ index ~ ': content must be text') -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type != 'text' -%}
        {{- raise_exception('message ' ~ index ~ ': only text parts are supported') -}}
      {%- endif -%}
      {{- part.text | trim if trimmed else part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set ns = namespace(prefix='', shift=0) -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set ns.prefix = plain(messages[0].content, 0, false) ~ '\\n\\n' -%}
  {%- set ns.shift = 1 -%}
{%- endif -%}
{%- if messages | length == ns.shift -%}
  {{- raise_exception('a conversation needs a user message') -}}
{%- endif -%}
{%- for message in messages[ns.shift:] -%}
  {%- set speaker = 'model' if message.role == 'assistant' else message.role -%}
  {%- if speaker != ('user' if loop.index0 % 2 == 0 else 'model') -%}
    {{- raise_exception('message ' ~ (loop.index0 + ns.shift) ~ ': roles must alternate') -}}
  {%- endif -%}
  {{- '<start_of_turn>' ~ speaker ~ '\\n' ~ (ns.prefix if loop.first else '') -}}
  {{- plain(message.content, loop.index0 + ns.shift, true) ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


class ChatMessage(TypedDict):
    """A message.

    ``role`` is system, developer, user, assistant or tool, as far as the chat template knows it. An
    assistant's message may have ``tool_calls`` instead of content; the answer to a call has the
    role tool, and ``name`` is the function's.
    """

    role: str
    content: NotRequired[str | Sequence[Mapping[str, object]]]
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]


def check_conversation(messages: Sequence[ChatMessage]) -> None:
    """Check a conversation in Gemma's own format.

    Content is text, or a list of text parts.

    Raises:
        InputError: the conversation is empty or has no user message, a role is unknown or out of
            order, or content is not text.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            f"a conversation must be a list of messages, not {type(messages).__name__}"
        )
    if not messages:
        raise InputError("the conversation is empty; give at least one user message")
    turns = 0
    for index, message in enumerate(messages):
        role = _role(index, message)
        _check_content(index, role, message)
        if role == "system":
            if index:
                raise InputError(
                    f"message {index} has role 'system'; only message 0 can be a system message"
                )
            continue
        expected = "model" if turns % 2 else "user"
        if role != expected:
            wanted = "assistant" if expected == "model" else "user"
            raise InputError(
                f"message {index} has role {message['role']!r:.80} instead of {wanted!r}; roles "
                "must alternate between user and assistant, starting with user"
            )
        turns += 1
    if not turns:
        raise InputError("the conversation has only a system message; add a user message after it")


def _role(index: int, message: object) -> str:
    if not isinstance(message, Mapping):
        raise InputError(
            f"message {index} is of type {type(message).__name__}; it must have a role and content"
        )
    role = message.get("role")
    if role in ("assistant", "model"):
        return "model"
    if role not in ("system", "user"):
        raise InputError(f"message {index} has role {role!r:.80}; use system, user or assistant")
    return str(role)


def _check_content(index: int, role: str, message: Mapping[str, object]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise InputError(
            f"message {index} ({role}) has content of type {type(content).__name__}; "
            "it must be a string or a list of text parts"
        )
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            named = f"type {kind!r:.80}" if kind else "no type"
            raise InputError(
                f"message {index} ({role}): content part {number} has {named}; only parts of type "
                "'text' are supported"
            )
        if not isinstance(part.get("text"), str):
            raise InputError(f"message {index} ({role}): content part {number} has no text")
