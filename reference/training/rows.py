"""Read rows of training data: JSON objects with messages, with prompt and completion, or with text.

The columns are those that TRL's trainers take. A row with several of them needs a choice, and a row
with none of them is an error, because learning the wrong text shows only after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma3_export.errors import InputError
from gemma3_export.files import open_regular
from gemma3_export.tokenizer.json_rows import (
    COMPLETION,
    MESSAGES,
    PROMPT,
    TEXT,
    checked_messages,
    checked_text,
    choose_column,
    given_columns,
    read_lines,
    template_columns,
)

if TYPE_CHECKING:
    from gemma3_export.tokenizer import ChatMessage

__all__ = [
    "COMPLETION",
    "MESSAGES",
    "PROMPT",
    "TEXT",
    "Example",
    "Split",
    "parse_row",
    "read_rows",
]

Split = Literal["train", "validation"]


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
    with open_regular(path) as file:
        for line in read_lines(file, path):
            yield line.where, line.parse()


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
    given = given_columns(row, where)
    column = choose_column(given, where, column)
    if column == MESSAGES:
        messages = checked_messages(given[MESSAGES], f"{where}: {MESSAGES}")
        return Example(
            where=where, messages=messages, split=split, **template_columns(given, where)
        )
    if column == PROMPT:
        return _prompt_and_completion(given, where, split)
    return checked_text(given[column], where, column)


def _prompt_and_completion(given: Mapping[str, Any], where: str, split: Split | None) -> Example:
    if COMPLETION not in given:
        raise InputError(f"{where} has a prompt without completion; add the answer to learn")
    prompt, completion = given[PROMPT], given[COMPLETION]
    options = template_columns(given, where)
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
    asked = checked_messages(prompt, f"{where}: {PROMPT}")
    answered = checked_messages(completion, f"{where}: {COMPLETION}")
    return Example(
        where=where,
        messages=[*asked, *answered],
        prompt_messages=len(asked),
        split=split,
        **options,
    )
