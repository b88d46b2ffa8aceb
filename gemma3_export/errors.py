"""Define the exceptions that the package raises on purpose.

Each message names the offending value and the remedy. The command line prints it without a
traceback and exits with ``exit_code``. Any other exception is a bug.
"""

from __future__ import annotations

__all__ = [
    "EngineClosedError",
    "Gemma3ExportError",
    "InputError",
    "ParityError",
    "QueueFullError",
    "TextTooLongError",
    "UnavailableError",
]


class Gemma3ExportError(Exception):
    """Base class of all exceptions of this package; by itself, a failed operation (exit code 1)."""

    exit_code = 1


class ParityError(Gemma3ExportError):
    """A runtime's results differ from those of the reference (exit code 1)."""


class QueueFullError(Gemma3ExportError):
    """Too many requests wait for an engine; one may succeed later (exit code 1)."""


class EngineClosedError(Gemma3ExportError):
    """A request to an engine that is closing, closed or broken (exit code 1)."""


class InputError(Gemma3ExportError):
    """Invalid weights, config, tokenizer, bundle, prompt or option (exit code 2)."""

    exit_code = 2


class TextTooLongError(InputError):
    """A text that certainly has more tokens than allowed (exit code 2).

    Args:
        least: number of tokens that the text has at least.
        most: number that is allowed.
    """

    def __init__(self, least: int, most: int) -> None:
        super().__init__(
            f"the prompt has at least {least} tokens, and at most {most} are allowed; shorten it"
        )
        self.least, self.most = least, most


class UnavailableError(Gemma3ExportError):
    """A missing package, device or network connection (exit code 3)."""

    exit_code = 3
