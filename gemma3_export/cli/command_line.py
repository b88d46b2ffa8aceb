"""The command group: loads commands lazily and turns errors into exit codes in one place."""

from __future__ import annotations

import difflib
import errno
import importlib
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from gemma3_export import __version__
from gemma3_export.cli.styles import styled, use_color
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.limits import shown
from gemma3_export.runtimes.onnx.huge_pages import with_huge_pages
from gemma3_export.signals import install_signal_handlers, interrupt_exit_code

__all__ = ["command_line", "main"]

# In the order that `--help` lists them. The command NAME is the function NAME in the module
# NAME_command, with "_" in place of "-".
COMMANDS = (
    "onnx",
    "torchscript",
    "pt2",
    "generate",
    "chat",
    "batch",
    "serve",
    "triton",
    "verify",
    "inspect",
    "push",
    "bench",
    "doctor",
    "data",
    "train",
    "to-hf",
    "completion",
)
# Commands that decode, so that their weights should be in huge pages.
DECODING = ("generate", "chat", "batch", "serve")
MAX_MESSAGE_CHARACTERS = 3000
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
EPILOG = """\b
Exit codes: 0 success, 1 failure (including failed parity), 2 invalid usage or input,
3 could not run (missing package, device or network), 130 interrupted, 143 terminated.

\b
Examples:
  gemma3-export onnx --weights google/gemma-3-270m -o gemma-3-270m
  gemma3-export generate gemma-3-270m --prompt "The sea is"
"""


class CommandLine(click.Group):
    """Click group that imports commands on demand and reports expected errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all installed commands."""
        return [name for name in COMMANDS if importlib.util.find_spec(_module_of(name))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command ``cmd_name``, or None if there is none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = getattr(importlib.import_module(_module_of(cmd_name)), _identifier(cmd_name))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` begin with; suggest one for a name that is mistyped."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
            raise click.UsageError(f"no such command {shown(name)}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command and turn expected errors into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except Gemma3ExportError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(styled(f"error: {_one_line(str(error))}"), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as interruption:
            click.echo("interrupted", err=True)
            ctx.exit(interrupt_exit_code(interruption))
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                _discard_stdout()  # the reader (head, less) has exited, which is not an error
                ctx.exit(1)
            if ctx.params.get("debug"):
                traceback.print_exc()
            ctx.exit(_explain(error))

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command line; also explain an error while help is printed."""
        try:
            return super().main(*arguments, **options)
        except OSError as error:
            sys.exit(_explain(error))


def _one_line(message: str) -> str:
    """Escape line breaks and control characters, and shorten what is very long.

    A name in a damaged file may contain them, and would write to the terminal what it likes. The
    end stays, which has the remedy.
    """
    if len(message) > MAX_MESSAGE_CHARACTERS:
        half = MAX_MESSAGE_CHARACTERS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in message
    )


def _module_of(name: str) -> str:
    return f"gemma3_export.cli.{_identifier(name)}_command"


def _identifier(name: str) -> str:
    return name.replace("-", "_")


def _explain(error: OSError | MemoryError) -> int:
    """Print an error of the system that no command expects, and return the exit code."""
    if isinstance(error, MemoryError):
        what, remedy, code = "out of memory", "use a smaller model or a machine with more", 1
    elif error.filename is None:  # a stream
        _discard_stdout()
        what, remedy, code = "cannot write the output", "check where it goes", 1
    else:
        what, remedy = f"cannot use {error.filename}", "check its path, permissions and disk"
        code = 1 if error.errno in DISK_ERRORS else InputError.exit_code
    with suppress(OSError):  # stderr may be full too
        reason = getattr(error, "strerror", "") or error
        click.echo(styled(f"error: {what}: {reason}; {remedy}"), err=True)
    return code


def _discard_stdout() -> None:
    """Keep Python from flushing into the broken pipe again at exit."""
    sys.stdout = io.StringIO()


def _open_missing_streams() -> None:
    """Open stdin, stdout and stderr if they are closed, so that no other file takes their place.

    Writing to such a stdout fails; a stderr that nobody wants is not an error.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            found = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            assert found == descriptor  # the lowest that is free
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


@click.group(
    cls=CommandLine,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="gemma3-export")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def command_line(debug: bool) -> None:
    """Export Gemma 3 to ONNX or TorchScript, prove the export, and generate text from it."""
    click.get_current_context().color = use_color()
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(
            "the current folder has been deleted; change to one that exists and try again"
        ) from error
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without UTF-8 shows a replacement character instead of raising an error.
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
            if sys.platform == "win32" and not stream.isatty():
                stream.reconfigure(encoding="utf-8", newline="\n")  # files and pipes, as elsewhere


def _restart_with_huge_pages(arguments: Sequence[str]) -> None:
    """Start this process again if its C library should ask for huge pages.

    The C library decides when a process starts. The new process has the same id, and nothing has
    been read or written yet.
    """
    command = next((one for one in arguments if not one.startswith("-")), None)
    if command not in DECODING or {"--no-huge-pages", "--help", "-h"} & set(arguments):
        return
    if not _is_own_process(arguments):
        return
    variables = with_huge_pages(os.environ)
    if variables is None or not sys.executable:
        return
    with suppress(OSError):  # then it runs without
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)  # noqa: S606


def _is_own_process(arguments: Sequence[str]) -> bool:
    """Return whether the process was started for this command, and not by a caller of main()."""
    end = len(sys.orig_argv) - len(arguments)
    program, given = sys.orig_argv[1:end], sys.orig_argv[end:]
    if not program or given != list(arguments):
        return False
    return program[-2:] == ["-m", "gemma3_export"] or Path(program[-1]).stem == "gemma3-export"


def main() -> NoReturn:
    """Run ``gemma3-export`` or ``python -m gemma3_export``."""
    _restart_with_huge_pages(sys.argv[1:])
    _open_missing_streams()
    install_signal_handlers()
    command_line(prog_name="gemma3-export")
    raise AssertionError("click ends the process")
