"""Collect prompts from arguments, files and standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3_export.errors import InputError
from gemma3_export.files import read_text
from gemma3_export.tokenizer import ChatMessage, Tokenizer

__all__ = [
    "MAX_PROMPT_BYTES",
    "Prompt",
    "decode",
    "read_prompt",
    "read_prompt_file",
    "read_tools",
    "to_prompts",
]

STDIN = "-"
MAX_PROMPT_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as the user gave it and as the model takes it."""

    text: str | None  # None for token ids
    value: str | list[int] | list[ChatMessage]


def to_prompts(
    tokenizer: Tokenizer | None,
    texts: Sequence[str],
    id_lists: Sequence[str],
    *,
    chat: bool,
    system: str | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Prompt]:
    """Return all prompts: first the texts, then the token ids, each in the order given.

    Raises:
        InputError: a prompt is empty, is not a list of token ids, or is text and the bundle has no
            tokenizer.
    """
    prompts = []
    for number, text in enumerate(texts, 1):
        if tokenizer is None:
            raise InputError(
                "this bundle has no tokenizer, so it accepts token ids only; pass "
                "--prompt-ids 2,651,4864, or export the bundle again with --tokenizer"
            )
        if not text.strip():
            raise InputError(f"prompt {number} is empty; pass some text, or --prompt-ids 2")
        value: str | list[ChatMessage] = text
        if chat:
            opening = tokenizer.chat.opening(system, tools)
            value = [*opening, ChatMessage(role="user", content=text)]
        prompts.append(Prompt(text=text, value=value))
    prompts += [Prompt(text=None, value=_parse_ids(ids)) for ids in id_lists]
    return prompts


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Return the JSON schemas of functions in a file: a list of objects.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    text = read_prompt_file(path)
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(tools, list) or not tools or not all(isinstance(t, dict) for t in tools):
        raise InputError(
            f"{path} must be a list of JSON schemas of functions, such as "
            '[{"type": "function", "function": {"name": "now", "parameters": {}}}]'
        )
    return tools


def read_prompt(text: str) -> str:
    """Return ``text``, or standard input if ``text`` is ``-``.

    Raises:
        InputError: the input is not UTF-8.
    """
    if text != STDIN:
        return text
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"standard input is larger than {MAX_PROMPT_BYTES} bytes; shorten it")
    return decode(data, "standard input")


def read_prompt_file(path: Path) -> str:
    """Return the text of a prompt file, without its last newline.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    if str(path) == STDIN:
        return read_prompt(STDIN)
    return _without_last_newline(read_text(path, limit_bytes=MAX_PROMPT_BYTES, or_pipe=True))


def decode(data: bytes, where: str) -> str:
    """Return UTF-8 text without its last newline; ``where`` is for the message.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return _without_last_newline(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from error


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--prompt-ids {text!r:.60} is not a list of token ids; use a form like 2,651,4864"
        ) from None
