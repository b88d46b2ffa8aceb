"""Hold a conversation: read messages and commands, stream the answers.

In a terminal, an error or Ctrl-C ends the turn and not the conversation. Otherwise each line is a
turn, and the first error ends the program.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT

import click

from gemma3_export.api.model import Chat
from gemma3_export.api.options import GenerateOptions, merged
from gemma3_export.cli.generate_output import speed_line
from gemma3_export.cli.line_input import FENCE, ReadLine, line_reader, read_message
from gemma3_export.cli.options import is_terminal
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import to_path
from gemma3_export.signals import DeferredSignals, Terminated
from gemma3_export.staging import write_text_atomically

__all__ = ["Conversation"]

SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "max_new_tokens",
)
NO_EFFECT = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
NO_SYSTEM = "-"
HELP = f"""\
/system TEXT      set the system message and start over; {NO_SYSTEM} removes it; alone, shows it
/reset            forget the conversation, but not the system message
/save FILE        write the conversation as a line of JSON, which `data` reads
/set NAME VALUE   change {", ".join(SETTINGS[:5])},
                  {", ".join(SETTINGS[5:])};
                  off turns a filter or penalty off; alone, lists them
/help             list the commands
/quit             leave, as Ctrl-D does
Ctrl-C ends an answer. A message of several lines begins and ends with {FENCE}.
A message that begins with // is sent with one slash.
"""


@dataclass(slots=True)
class Conversation:
    """A conversation with a person, or with a script that writes one turn per line.

    Args:
        chat: answers; its options are changed by ``/set``.
        system: the system message of ``chat``.
    """

    chat: Chat
    system: str | None = None
    is_interactive: bool = field(default_factory=is_terminal)
    saved: set[Path] = field(default_factory=set)  # files that this conversation may replace

    def run(self) -> None:
        """Read and answer messages until the input ends.

        Raises:
            Gemma3ExportError: a turn failed, and nobody is there to go on.
            KeyboardInterrupt: as above; or the program was terminated.
        """
        read_line, hint = line_reader([f"/{name}" for name in self.commands])
        if self.is_interactive:
            runtime = self.chat.model.runtime.info
            note(
                f"{self.chat.model.path} on {runtime.name}, {runtime.device}. /help lists the "
                "commands, Ctrl-D leaves."
            )
            if hint:
                note(hint)
        while True:
            try:
                self._take_turn(read_line)
            except EOFError:
                break
            except Terminated:
                raise
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                note("\ninterrupted; Ctrl-D leaves")
            except Gemma3ExportError as error:
                if not self.is_interactive:
                    raise
                note(f"error: {error}")
        if self.is_interactive:
            click.echo()

    @property
    def commands(self) -> dict[str, Callable[[str], None]]:
        """What the user may type after a slash."""
        return {
            "system": self._set_system,
            "reset": self._reset,
            "save": self._save,
            "set": self._set,
            "help": self._help,
            "quit": self._quit,
            "exit": self._quit,
        }

    def _take_turn(self, read_line: ReadLine) -> None:
        text, is_literal = read_message(read_line)
        if not text.strip():
            return
        if not is_literal and text.startswith("/") and not text.startswith("//"):
            name, _, argument = text[1:].strip().partition(" ")
            self._command(name)(argument.strip())
            return
        self._answer(text if is_literal else text.removeprefix("/"))

    def _command(self, name: str) -> Callable[[str], None]:
        if command := self.commands.get(name):
            return command
        near = difflib.get_close_matches(name, self.commands, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them."
        raise InputError(
            f"unknown command /{name:.40}; {hint} To send it as a message, begin with //"
        )

    def _answer(self, text: str) -> None:
        """Send a message and print the answer. Ctrl-C ends it; a second one drops the turn."""
        before = self.chat.messages
        signals = DeferredSignals()
        try:
            with (
                signals,
                self.chat.stream(text, cancel=lambda: bool(signals.received)) as stream,
            ):
                for piece in stream:
                    click.echo(self._shown(piece), nl=False)
        except InputError as error:
            if not before:
                raise
            raise InputError(f"{error}; or start over with /reset") from error
        finally:
            if signals.received and not (self.is_interactive and signals.received == SIGINT):
                signals.raise_received()
        click.echo()
        done = stream.completion
        if done.finish_reason == "cancelled" and not done.text:
            self.chat.messages = before  # nothing was said, so there is nothing to remember
        note(click.style(speed_line([done]), dim=True))
        if done.finish_reason == "length":
            note(
                f"the answer was cut off after {len(done.tokens)} tokens; /set max_new_tokens "
                "allows more, as far as the model's context goes"
            )

    def _shown(self, text: str) -> str:
        """Return text without the control characters that a terminal would obey."""
        if not self.is_interactive:
            return text
        return "".join(
            repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
            for c in text
        )

    def _set_system(self, argument: str) -> None:
        if not argument:
            note("there is no system message" if self.system is None else self.system)
            return
        system = None if argument == NO_SYSTEM else argument
        self.chat = self.chat.model.chat(system, self.chat.options)
        self.system = system
        note("the conversation starts over")

    def _reset(self, argument: str) -> None:
        _refuse_argument("reset", argument)
        self.chat.reset()
        note("the conversation starts over")

    def _save(self, argument: str) -> None:
        if not argument:
            raise InputError("/save needs the name of a file, such as /save chat.jsonl")
        if not any(message["role"] == "assistant" for message in self.chat.messages):
            raise InputError("nothing has been said yet, so there is nothing to save")
        path = to_path(argument).expanduser().absolute()
        if path.exists() and path not in self.saved:
            raise InputError(f"{path} exists; choose another name")
        row = json.dumps({"messages": self.chat.messages}, ensure_ascii=False)
        write_text_atomically(path, f"{row}\n")
        self.saved.add(path)
        note(f"saved {len(self.chat.messages)} messages to {path}")

    def _set(self, argument: str) -> None:
        words = argument.split()
        if not words:
            note("\n".join(f"{name} = {self._setting(name)}" for name in SETTINGS))
            return
        name = words[0].lstrip("-").replace("-", "_")
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(SETTINGS)}"
            raise InputError(f"unknown setting {words[0]:.40}; {hint}")
        if len(words) > 2:
            raise InputError(f"/set takes a name and a value, such as /set {name} 1")
        if len(words) == 2:
            value = _parse_number(name, words[1])
            self.chat.options = merged(GenerateOptions, self.chat.options, {name: value})
        note(f"{name} = {self._setting(name)}")
        options = self.chat.options
        if name == "seed" and options.seed is not None and options.is_greedy:
            note("it has no effect until /set temperature 1, or a filter, lets answers be sampled")

    def _setting(self, name: str) -> str:
        value = getattr(self.chat.options, name)
        return "off" if value is None else str(value)

    def _help(self, argument: str) -> None:
        _refuse_argument("help", argument)
        click.echo(HELP, nl=False)

    def _quit(self, argument: str) -> None:
        _refuse_argument("quit", argument)
        raise EOFError  # as if the input had ended


def note(text: str) -> None:
    """Print what is not part of an answer."""
    click.echo(text, err=True)


def _parse_number(name: str, text: str) -> float | int | None:
    """Return the value of a setting; ``off`` is None, or the value that has no effect.

    Raises:
        InputError: it is not a number.
    """
    if text.lower() in ("off", "none"):
        return NO_EFFECT.get(name)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(f"{name} is {text!r:.40}; it must be a number, or off")


def _refuse_argument(command: str, argument: str) -> None:
    if argument:
        raise InputError(
            f"/{command} takes nothing after it, and there is {argument!r:.40}; a message that "
            "begins with a slash is sent with //"
        )
