"""Handle SIGINT (Ctrl-C), SIGTERM and SIGHUP: raise an exception, or defer to a safe point."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = [
    "DeferredSignals",
    "Terminated",
    "install_signal_handlers",
    "interrupt_exit_code",
    "uninterrupted",
]

REPEAT_SECONDS = 2.0  # after a signal, ignore others for this long


class Terminated(KeyboardInterrupt):
    """The exception that SIGTERM raises."""

    number = signal.SIGTERM


INTERRUPTIONS: dict[int, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}
if sys.platform != "win32":  # which has no SIGHUP; SIGTERM is only raised by the process itself

    class HungUp(Terminated):
        """The exception that SIGHUP raises: the terminal was closed."""

        number = signal.SIGHUP

    INTERRUPTIONS[signal.SIGHUP] = HungUp


def install_signal_handlers() -> None:
    """Raise ``KeyboardInterrupt`` on SIGINT, :class:`Terminated` on SIGTERM, and on SIGHUP too.

    A SIGHUP that was ignored from the start, as under nohup, stays ignored.

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
        raise INTERRUPTIONS[number]

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)


def interrupt_exit_code(interruption: KeyboardInterrupt) -> int:
    """Return 128 plus the signal number, the exit code by shell convention."""
    number = interruption.number if isinstance(interruption, Terminated) else signal.SIGINT
    return 128 + int(number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP while the block runs, which must be short.

    They interrupt at its end, unless the block itself raises an error. A second Ctrl-C waits, too.
    """
    deferred = DeferredSignals(is_patient=True)
    with deferred:
        yield
    deferred.raise_received()


class DeferredSignals:
    """A context manager that records SIGINT, SIGTERM and SIGHUP instead of letting them interrupt.

    The caller polls ``received`` at points where it can stop. A second Ctrl-C interrupts at
    once. Outside the main thread, where Python delivers no signals, nothing is recorded.

    Args:
        is_patient: a second Ctrl-C does not interrupt either.
    """

    def __init__(self, *, is_patient: bool = False) -> None:
        self.is_patient = is_patient
        self.received = 0  # signal number, or 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in INTERRUPTIONS:
                if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup
                    continue
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
        if self.received == signal.SIGINT == number and not self.is_patient:
            raise KeyboardInterrupt
        self.received = number
