"""Ctrl-C and SIGTERM end a command the same way: by an exception that lets it clean up."""

from __future__ import annotations

import signal
import time
from types import FrameType

__all__ = ["Terminated", "exit_code_of", "handle_signals"]

PATIENCE_S = 2.0


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def handle_signals() -> None:
    """Raise on SIGINT and SIGTERM, but not twice in a row.

    A second Ctrl-C within two seconds is ignored: it would interrupt the removal of half-written
    files, which is what the first one asked for.
    """
    last = float("-inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        del frame
        now = time.monotonic()
        if now - last < PATIENCE_S:
            return
        last = now
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def exit_code_of(interruption: KeyboardInterrupt) -> int:
    """128 + the number of the signal, as shells have it."""
    kind = signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT
    return 128 + int(kind)
