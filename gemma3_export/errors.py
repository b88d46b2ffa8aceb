"""The one family of errors whose message is meant for the person at the terminal.

Every message names the offending value and the remedy. The command line prints it without a
traceback and exits with ``exit_code``; anything that is not a ``Gemma3ExportError`` is a bug.
"""

from __future__ import annotations

__all__ = [
    "Gemma3ExportError",
    "InputError",
    "ParityError",
    "UnavailableError",
]


class Gemma3ExportError(Exception):
    """Root of all errors raised on purpose; exit code 1 (the work was tried and failed)."""

    exit_code = 1


class ParityError(Gemma3ExportError):
    """A runtime does not compute what the reference computes (exit code 1)."""


class InputError(Gemma3ExportError):
    """Bad input: weights, config, tokenizer, bundle, prompt or option (exit code 2)."""

    exit_code = 2


class UnavailableError(Gemma3ExportError):
    """Something needed is absent: a package, a device, the network (exit code 3)."""

    exit_code = 3
