"""Handle SIGINT (Ctrl-C) and SIGTERM: raise an exception, or defer the signal to a safe point."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = [
    "DeferredSignals",
    "Terminated",
    "install_signal_handlers",
    "interrupt_exit_code",
]

REPEAT_SECONDS = 2.0  # after a signal, ignore others for this long


class Terminated(KeyboardInterrupt):
    """The exception that SIGTERM raises."""


def install_signal_handlers() -> None:
    """Raise ``KeyboardInterrupt`` on SIGINT and :class:`Terminated` on SIGTERM.

    A signal within two seconds of the previous one is ignored, because it would interrupt the
    cleanup of partial output that the first one started.
    """
    last = float("-inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        del frame
        now = time.monotonic()
        if now - last < REPEAT_SECONDS:
            return
        last = now
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def interrupt_exit_code(interruption: KeyboardInterrupt) -> int:
    """Return 128 plus the signal number, the exit code by shell convention."""
    number = signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT
    return 128 + int(number)


class DeferredSignals:
    """A context manager that records SIGINT and SIGTERM instead of letting them interrupt.

    The caller polls :attr:`received` at points where it can stop. A second Ctrl-C interrupts at
    once. Outside the main thread, where Python delivers no signals, nothing is recorded.
    """

    def __init__(self) -> None:
        self.received = 0  # signal number, or 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def raise_received(self) -> None:
        """Raise the recorded signal again, for the handlers outside of this block."""
        if self.received:
            signal.raise_signal(self.received)

    def _record(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
