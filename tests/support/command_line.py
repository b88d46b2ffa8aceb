"""Run the command line, in this process or in one of its own, and read what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from gemma3_export.cli import command_line

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 300  # a safety net for processes; nothing depends on how long they take
# Exports a model with random weights; the path of its config.json follows.
RANDOM_EXPORT = ("onnx", "--random-weights", 1, "--config")


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments], input=stdin)


def run_ok(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """Run a command that must succeed."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def run_rejected(*arguments: object, code: int = 2) -> str:
    """Run a command that must exit with ``code`` and print nothing on stdout; return stderr."""
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def error_line(*arguments: object, code: int = 2) -> str:
    """Run a command that must exit with ``code`` and one line ``error: ...``; return the line."""
    lines = run_rejected(*arguments, code=code).splitlines(keepends=True)
    message = "".join(line for line in lines if not line.endswith(" ...\n"))  # without progress
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


def json_lines(result: Result) -> list[dict[str, object]]:
    """Parse stdout as one JSON object per line."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def start(
    *arguments: object, code: str | None = None, **options: object
) -> subprocess.Popen[bytes]:
    """Start the command line in a process of its own, or the Python program ``code``."""
    program = ["-m", "gemma3_export"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = None) -> tuple[bytes, bytes]:
    """Wait for a process to exit, and kill one that hangs; return its stdout and stderr."""
    try:
        return process.communicate(stdin, timeout=TIMEOUT_S)
    finally:
        process.kill()


def loaded_modules(*arguments: object) -> set[str]:
    """Run a command in a process of its own; return the modules that it imported."""
    code = (
        "import sys\nfrom gemma3_export.cli import command_line\n"
        f"try:\n    command_line({[str(a) for a in arguments]!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*sorted(sys.modules), sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stderr.splitlines())
