"""Read rows of training data: JSON objects with messages, with prompt and completion, or with text.

The columns are those that TRL's trainers take. A row with several of them needs a choice, and a row
with none of them is an error, because learning the wrong text shows only after training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from gemma3_export.errors import InputError
from gemma3_export.files import open_regular

if TYPE_CHECKING:
    from gemma3_export.tokenizer import ChatMessage

__all__ = [
    "COMPLETION",
    "LOSS_ON",
    "MESSAGES",
    "PROMPT",
    "TEXT",
    "Example",
    "LossOn",
    "Split",
    "parse_row",
    "read_rows",
]

Split = Literal["train", "validation"]
LossOn = Literal["answers", "all"]

MESSAGES, PROMPT, COMPLETION, TEXT = "messages", "prompt", "completion", "text"
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SHAREGPT = "conversations"
MAX_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A conversation, or a prompt with its completion.

    Attributes:
        where: file and line, for error messages.
        messages: of the whole conversation; empty if prompt and completion are plain text.
        prompt_messages: how many of the messages are the prompt; None if every message of the
            assistant is an answer.
        prompt: plain text.
        completion: plain text.
        tools: JSON schemas for the chat template.
        variables: other variables of the chat template.
        split: set if the source has a validation split of its own.
    """

    where: str
    messages: Sequence[ChatMessage] = ()
    prompt_messages: int | None = None
    prompt: str = ""
    completion: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    split: Split | None = None

    def texts(self) -> Iterator[str]:
        """Yield everything that people or the model wrote, to train a tokenizer on."""
        yield self.prompt
        yield self.completion
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, str):
                yield content
            elif isinstance(content, Sequence):
                for part in content:
                    text = part.get("text") if isinstance(part, Mapping) else None
                    if isinstance(text, str):
                        yield text


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(file:line, object)`` for each line of a JSONL file that is not blank.

    Raises:
        InputError: a line is not a JSON object, is not UTF-8, or is too long.
    """
    number = 0
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(
                    f"{where} is longer than {MAX_LINE_BYTES:,} bytes; write one object per line"
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield where, _parse_line(line, where)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); convert the file"
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


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r:.60} occurs twice")
    return found


def parse_row(
    row: Mapping[str, Any], where: str, column: str | None, split: Split | None = None
) -> Example | str:
    """Return the example of a row, or its text if it is plain text.

    Args:
        row: the columns; those that are null count as missing, and unknown ones are ignored.
        where: file and line.
        column: the column to use if there are several: messages, prompt, or one with text.
        split: of the result.

    Raises:
        InputError: the row has no such column, or several without ``column``, or wrong types.
    """
    given = {key: value for key, value in row.items() if value is not None}
    if media := [key for key in MEDIA if given.get(key)]:
        raise InputError(f"{where} has {media[0]}; only text can be trained on, remove the row")
    column = _choose_column(given, where) if column is None else column
    if column not in given:
        raise InputError(f"{where} has no {column!r:.60}, only {_shown(given)}; correct the row")
    if column == MESSAGES:
        messages = _messages(given[MESSAGES], f"{where}: {MESSAGES}")
        return Example(where=where, messages=messages, split=split, **_options(given, where))
    if column == PROMPT:
        return _prompt_and_completion(given, where, split)
    if not isinstance(given[column], str):
        raise InputError(
            f"{where}: {column} is {given[column]!r:.60}; it must be a string, or name another "
            "column with --column"
        )
    text: str = given[column]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {column} has half of a surrogate pair ({error.reason}); correct the row"
        ) from error
    return text


def _choose_column(given: Mapping[str, Any], where: str) -> str:
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
        f"{where} has neither messages, prompt with completion, nor text, only {_shown(given)}; "
        "rename a column, or choose one that has text with --column"
    )


def _prompt_and_completion(given: Mapping[str, Any], where: str, split: Split | None) -> Example:
    if COMPLETION not in given:
        raise InputError(f"{where} has a prompt without completion; add the answer to learn")
    prompt, completion = given[PROMPT], given[COMPLETION]
    options = _options(given, where)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise InputError(f"{where}: the completion is empty; remove the row")
        if options:
            raise InputError(
                f"{where} has {' and '.join(options)} for a chat template, but its prompt is plain "
                "text; write the prompt as a list of messages"
            )
        return Example(where=where, prompt=prompt, completion=completion, split=split)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise InputError(
            f"{where}: one of prompt and completion is text and the other is not; both must be "
            "strings, or both lists of messages"
        )
    asked = _messages(prompt, f"{where}: {PROMPT}")
    answered = _messages(completion, f"{where}: {COMPLETION}")
    return Example(
        where=where,
        messages=[*asked, *answered],
        prompt_messages=len(asked),
        split=split,
        **options,
    )


def _messages(value: object, where: str) -> list[ChatMessage]:
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


def _options(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the columns that go into the template besides the messages."""
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


def _shown(given: Mapping[str, Any]) -> str:
    return f"{', '.join(sorted(given)) or 'no columns':.200}"
