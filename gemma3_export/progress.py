"""Report the progress of long operations: the callback type, and a renderer for stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

__all__ = ["Progress", "ProgressBars", "ignore_progress"]

BYTE_STAGES = ("writing weights", "hashing the source", "hashing the bundle", "copying the bundle")
SPEED_SECONDS = 120.0  # of work that the time left is estimated from
LINE_SECONDS = 30.0  # without a terminal, repeat the line of a long stage at this interval


class Progress(Protocol):
    """A callback that receives the current stage and how much of it is done.

    ``stage`` is a short phrase such as ``"writing weights"``. ``done`` and ``total`` share one
    unit, which depends on the stage: bytes while files are written or read, and otherwise units of
    about equal work, such as tokens times layers. A stage that cannot be divided reports ``(0, 1)``
    and ``(1, 1)``.
    """

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Receive one update."""


def ignore_progress(stage: str, done: int, total: int, /) -> None:
    """Discard a progress update."""


class ProgressBars:
    """A :class:`Progress` callback that draws on stderr; use it as a context manager.

    A terminal shows one bar with the time that the stage has taken and the time that is left,
    estimated from the work that is done. Both are redrawn from a thread of their own, so the clock
    ticks while one unit of work runs. Stages whose first word is the same, such as "comparing
    prefill" and "comparing decode", share a bar. Without a terminal each bar is one plain line,
    repeated every 30 seconds while it lasts.
    """

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._first_word = ""
        self._total = 0
        self._done = 0
        self._printed_at = 0.0

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Show that ``done`` of ``total`` bytes or steps of ``stage`` are complete."""
        first_word = stage.split()[0]
        is_new, self._first_word = first_word != self._first_word, first_word
        if not sys.stderr.isatty():
            self._print_line(stage, done, total, is_new=is_new)
            return
        restarts = total != self._total or done < self._done
        self._total, self._done = total, done
        if is_new or self._bars is None:
            self._close()
            self._bars = open_bars(is_bytes=stage in BYTE_STAGES and total > 1)
        elif restarts:
            self._bars.reset(self._bars.task_ids[0])
        self._bars.update(
            self._bars.task_ids[0],
            description=stage,
            completed=done,
            total=total if total > 1 else None,  # a stage that cannot be divided only pulses
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        self._first_word = ""

    def _print_line(self, stage: str, done: int, total: int, *, is_new: bool) -> None:
        now = time.monotonic()
        if is_new or now - self._printed_at >= LINE_SECONDS:
            share = f" ({done / total:.0%})" if not is_new and 0 < done <= total else ""
            click.echo(f"{stage}{share} ...", err=True)
            self._printed_at = now

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


def open_bars(
    *, is_bytes: bool, console: Console | None = None, clock: Callable[[], float] | None = None
) -> Bars:
    """Start a bar on stderr, or on ``console``; ``clock`` replaces the monotonic clock."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class TimeLeftColumn(TimeRemainingColumn):
        """The time left, named only where it is known: rich redraws it less often than a label."""

        def render(self, task: Task) -> Text:
            found = super().render(task)
            return found.append(" left") if found.plain.strip("-:") else found

    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if is_bytes else TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed"),
        TimeLeftColumn(),
        console=console or Console(stderr=True),
        transient=True,
        speed_estimate_period=SPEED_SECONDS,
        get_time=clock,
    )
    bars.start()
    bars.add_task("", total=None)
    return bars
