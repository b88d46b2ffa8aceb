"""Read JSON Lines with conversations or text, for training and for generation alike.

The columns are those that TRL's trainers take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from gemma3_export.errors import InputError
from gemma3_export.tokenizer.chat import ChatMessage

__all__ = [
    "COMPLETION",
    "MAX_LINE_BYTES",
    "MEDIA",
    "MESSAGES",
    "PROMPT",
    "SHAREGPT",
    "TEXT",
    "Line",
    "checked_messages",
    "checked_text",
    "choose_column",
    "given_columns",
    "read_lines",
    "template_columns",
]

MESSAGES, PROMPT, COMPLETION, TEXT = "messages", "prompt", "completion", "text"
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SHAREGPT = "conversations"
MAX_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file that is not blank."""

    where: str  # file and line, for error messages
    offset: int  # in bytes
    data: bytes

    def parse(self) -> dict[str, Any]:
        """Return the JSON object that the line is.

        Raises:
            InputError: it is something else, or not UTF-8.
        """
        where = self.where
        try:
            row = json.loads(self.data.decode("utf-8"), object_pairs_hook=_without_repeats)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); convert the "
                "file"
            ) from error
        except RecursionError as error:
            raise InputError(f"{where} is nested too deeply; correct or remove the line") from error
        except ValueError as error:
            raise InputError(
                f"{where} is not valid JSON ({error}); write one object per line, or name the file "
                ".txt if it is plain text"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{where} is a JSON {type(row).__name__}; each line must be an object such as "
                '{"messages": [...]}'
            )
        return row


def read_lines(file: IO[bytes], path: Path, unit: str = ":") -> Iterator[Line]:
    """Yield each line of a JSONL file that is not blank, without a byte order mark.

    Args:
        file: open for reading, at its start.
        path: its name, for messages.
        unit: what goes between name and number there; ``" row "`` for the rows of a table.

    Raises:
        InputError: a line is too long.
    """
    number = offset = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}{unit}{number}"
        if len(line) > MAX_LINE_BYTES:
            raise InputError(
                f"{where} is longer than {MAX_LINE_BYTES:,} bytes; write one object per line"
            )
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            yield Line(where, offset + len(line) - len(text), text)
        offset += len(line)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r:.60} occurs twice")
    return found


def given_columns(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the columns of a row that are not null.

    Raises:
        InputError: it has images, video or audio.
    """
    given = {key: value for key, value in row.items() if value is not None}
    if media := [key for key in MEDIA if given.get(key)]:
        raise InputError(f"{where} has {media[0]}; the models take only text, so remove the row")
    return given


def choose_column(given: Mapping[str, Any], where: str, column: str | None) -> str:
    """Return ``column``, or the one of messages, prompt and text that a row has.

    Raises:
        InputError: the row has none of them or several, or not ``column``.
    """
    if column is not None:
        if column not in given:
            raise InputError(
                f"{where} has no {column!r:.60}, only {_names(given)}; correct the row"
            )
        return column
    found = [name for name in (MESSAGES, PROMPT, TEXT) if name in given]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{where} has {' and '.join(found)}; choose one with --column {found[0]}")
    if SHAREGPT in given:
        raise InputError(
            f"{where} has {SHAREGPT}; rename it to messages, and from and value in it to role "
            "(user, assistant) and content"
        )
    raise InputError(
        f"{where} has neither messages, prompt nor text, only {_names(given)}; rename a column, or "
        "choose one that has text with --column"
    )


def checked_text(value: object, where: str, column: str) -> str:
    """Return the text of a column.

    Raises:
        InputError: it is something else, or has half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(
            f"{where}: {column} is {value!r:.60}; it must be a string, or name another column with "
            "--column"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {column} has half of a surrogate pair ({error.reason}); correct the row"
        ) from error
    return value


def checked_messages(value: object, where: str) -> list[ChatMessage]:
    """Return the messages of a column; the chat template checks what is in them.

    Raises:
        InputError: it is not a list of objects with a role.
    """
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{where} is {value!r:.60}; it must be a list of messages with role and content"
        )
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            hint = ""
            if isinstance(message, Mapping) and "from" in message:
                hint = "; rename from and value to role (user, assistant) and content"
            raise InputError(
                f"{where}[{index}] is {message!r:.60}; it must be an object with role and "
                f"content{hint}"
            )
    return cast("list[ChatMessage]", value)


def template_columns(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the columns that go into the template besides the messages.

    They are ``tools`` and ``variables`` (the column chat_template_kwargs), if the row has them.

    Raises:
        InputError: one is of another type.
    """
    options: dict[str, Any] = {}
    if (tools := given.get("tools")) is not None:
        if isinstance(tools, str):  # as datasets with tools of different shapes store them
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: tools is not valid JSON ({error})") from error
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise InputError(f"{where}: tools is {tools!r:.60}; it must be a list of JSON schemas")
        if tools:
            options["tools"] = tools
    if (variables := given.get("chat_template_kwargs")) is not None:
        if not isinstance(variables, Mapping):
            raise InputError(
                f"{where}: chat_template_kwargs is {variables!r:.60}; it must be an object"
            )
        if variables:
            options["variables"] = variables
    return options


def _names(given: Mapping[str, Any]) -> str:
    return f"{', '.join(sorted(given)) or 'no columns':.200}"
