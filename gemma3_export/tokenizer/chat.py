"""Convert conversations to Gemma's chat format.

A conversation is a sequence of turns. A turn is ``<start_of_turn>``, the speaker's name, a newline,
the text, ``<end_of_turn>`` and a newline. There is no system speaker: a system message is prepended
to the first user message, with a blank line between them.

The text of a message may contain ``<end_of_turn>`` and so pretend to end its turn. In a rendered
string that is indistinguishable from the control token, so ``render_chat`` raises an error.
``Tokenizer.encode_chat`` encodes each turn separately and treats such text as plain characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from gemma3_export.errors import InputError

__all__ = [
    "CHAT_TEMPLATE",
    "CONTROL_TOKENS",
    "END_OF_TURN",
    "GENERATION_PROMPT",
    "START_OF_TURN",
    "ChatMessage",
    "Turn",
    "chat_turns",
    "render_chat",
]

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
GENERATION_PROMPT = f"{START_OF_TURN}model\n"
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

# The same format for tools that read tokenizer_config.json. Tests compare it with render_chat.
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
  {%- if speaker != ('user' if loop.index0 is even else 'model') -%}
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
    """A message; ``role`` is system, user or assistant (``model`` is an alias of assistant)."""

    role: str
    content: str | Sequence[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A turn of one speaker; ``index`` is its message, for error messages."""

    index: int
    speaker: str
    text: str


def chat_turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Check a conversation and merge its system message into the first user turn.

    Content is trimmed as the official template does: each string and each text part separately,
    but not the system message. All text parts of a system message are used; the official template
    drops all but the first.

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
    turns: list[Turn] = []
    prefix = ""
    for index, message in enumerate(messages):
        role = _role(index, message)
        if role == "system":
            if index:
                raise InputError(
                    f"message {index} has role 'system'; only message 0 can be a system message"
                )
            prefix = _text(index, role, message, trimmed=False) + "\n\n"
            continue
        expected = "model" if len(turns) % 2 else "user"
        if role != expected:
            wanted = "assistant" if expected == "model" else "user"
            raise InputError(
                f"message {index} has role {message['role']!r:.80} instead of {wanted!r}; roles "
                "must alternate between user and assistant, starting with user"
            )
        text = _text(index, role, message, trimmed=True)
        turns.append(Turn(index=index, speaker=role, text=text if turns else prefix + text))
    if not turns:
        raise InputError("the conversation has only a system message; add a user message after it")
    return turns


def render_chat(messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
    """Render a conversation as Gemma's template does, without the leading ``<bos>``.

    To get token ids, use ``Tokenizer.encode_chat``, which also accepts text that contains control
    tokens.

    Raises:
        InputError: see :func:`chat_turns`; or a message contains a control token, which a string
            cannot distinguish from a real one.
    """
    parts: list[str] = []
    for turn in chat_turns(messages):
        if found := [token for token in CONTROL_TOKENS if token in turn.text]:
            raise InputError(
                f"message {turn.index} ({turn.speaker}) contains the control token {found[0]!r}; "
                "remove it, or use Tokenizer.encode_chat, which encodes it as plain characters"
            )
        parts.append(f"{START_OF_TURN}{turn.speaker}\n{turn.text}{END_OF_TURN}\n")
    if add_generation_prompt:
        parts.append(GENERATION_PROMPT)
    return "".join(parts)


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


def _text(index: int, role: str, message: Mapping[str, object], *, trimmed: bool) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content.strip() if trimmed else content
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise InputError(
            f"message {index} ({role}) has content of type {type(content).__name__}; "
            "it must be a string or a list of text parts"
        )
    texts: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            named = f"type {kind!r:.80}" if kind else "no type"
            raise InputError(
                f"message {index} ({role}): content part {number} has {named}; only parts of type "
                "'text' are supported"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InputError(f"message {index} ({role}): content part {number} has no text")
        texts.append(text.strip() if trimmed else text)
    return "".join(texts)
