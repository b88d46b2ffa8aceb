"""Read the messages of a conversation from a terminal or from a pipe.

In a terminal, prompt_toolkit edits messages of several lines, completes commands and recalls
earlier messages. Without it, ``input`` reads a line at a time, with readline where Python has it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click

from gemma3_export.cli.options import is_terminal
from gemma3_export.cli.prompts import MAX_PROMPT_BYTES, decode
from gemma3_export.errors import InputError

__all__ = ["FENCE", "HINT", "ReadLine", "line_reader", "read_message"]

ReadLine = Callable[[str], str]  # takes the prompt; raises EOFError at the end of the input
FENCE = '"""'  # around a message of several lines
PROMPT, CONTINUATION = ">>> ", "... "
HINT = 'to edit several lines and complete commands: pip install "gemma3-export[chat]"'


def read_message(read_line: ReadLine) -> tuple[str, bool]:
    """Return the next message, and whether it was fenced by ``\"\"\"``, which makes it literal.

    Raises:
        EOFError: the input has ended.
        InputError: it has ended in the middle of a message.
        KeyboardInterrupt: Ctrl-C.
    """
    line = read_line(PROMPT)
    if not line.lstrip().startswith(FENCE):
        return line, False
    rest = line.lstrip().removeprefix(FENCE)
    lines = [rest] if rest.strip() else []
    while not (lines and lines[-1].rstrip().endswith(FENCE)):
        try:
            lines.append(read_line(CONTINUATION))
        except EOFError as error:
            raise InputError(
                f"the message that begins with {FENCE} does not end with it"
            ) from error
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).removesuffix("\n"), True


def line_reader(commands: Sequence[str]) -> tuple[ReadLine, str]:
    """Return the best reader for the standard input, and a hint if there is a better one.

    Args:
        commands: to complete.
    """
    if not is_terminal():
        return _read_piped_line, ""
    if os.environ.get("TERM") == "dumb":
        return input, ""
    if importlib.util.find_spec("prompt_toolkit") is None:
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  # gives input() its editing and its history
        return input, HINT
    return _editor(commands), ""


def _read_piped_line(prompt: str) -> str:
    del prompt
    data = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
    if not data:
        raise EOFError
    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"a line of standard input is larger than {MAX_PROMPT_BYTES} bytes")
    return decode(data, "standard input")


def _editor(commands: Sequence[str]) -> ReadLine:
    """Return an editor of prompt_toolkit: Enter sends, Alt-Enter begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    def begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    bindings = KeyBindings()
    bindings.add("escape", "enter")(begin_line)
    session = PromptSession(  # its history is in memory: conversations may be private
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        key_bindings=bindings,
        prompt_continuation=lambda width, line, is_wrapped: " " * width,
    )

    def read(prompt: str) -> str:
        click.echo(nl=False)  # flushes what the answer has written
        return str(session.prompt(prompt))

    return read
