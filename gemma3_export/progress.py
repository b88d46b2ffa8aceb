"""Progress on stderr: a bar a stage on a terminal, and a plain line a stage anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

import click

__all__ = ["ProgressBars"]

BYTE_STAGES = ("writing weights", "hashing the source")
LINE_SECONDS = 30.0  # without a terminal, a stage that goes on says so again after this


class ProgressBars:
    """A progress callback ``(stage, done, total)``; use it as a context manager."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._kind: str | None = None
        self._said = 0.0  # when the last plain line was printed

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes or steps of ``stage`` are behind us."""
        kind = stage.split()[0]  # "comparing decode" goes on in the bar of "comparing prefill"
        is_new, self._kind = kind != self._kind, kind
        if not sys.stderr.isatty():
            self._say(stage, done, total, is_new=is_new)
            return
        if is_new:
            self._open(stage, total)
        self._bar.set_description_str(stage, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        self._kind = None

    def _say(self, stage: str, done: int, total: int, *, is_new: bool) -> None:
        now = time.monotonic()
        if is_new or now - self._said >= LINE_SECONDS:
            share = f" ({done / total:.0%})" if not is_new and 0 < done <= total else ""
            click.echo(f"{stage}{share} ...", err=True)
            self._said = now

    def _open(self, stage: str, total: int) -> None:
        from tqdm import tqdm

        self._close()
        is_bytes = stage in BYTE_STAGES and total > 1
        self._bar = tqdm(
            desc=stage,
            total=total,
            unit="B" if is_bytes else "step",
            unit_scale=is_bytes,
            leave=False,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
