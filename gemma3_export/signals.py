"""Ctrl-C and SIGTERM end a command the same way: by an exception that lets it clean up."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = [
    "StopSignals",
    "Terminated",
    "exit_code_of",
    "handle_signals",
]

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


# SIGTERM and Ctrl-C wait for the end of a step, so that what is saved is whole.


class StopSignals:
    """Notes the first signal instead of letting it interrupt; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal, 0 for none
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Let the signal do, after this block, what it would have done before it."""
        if self.received:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
