"""Progress bars on stderr, one a stage; nothing is shown when stderr is not a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

__all__ = ["ProgressBars"]

BYTE_STAGES = ("writing weights", "hashing the source")


class ProgressBars:
    """A progress callback ``(stage, done, total)``; use it as a context manager."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._kind: str | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes or steps of ``stage`` are behind us."""
        kind = stage.split()[0]  # "comparing decode" goes on in the bar of "comparing prefill"
        if kind != self._kind:
            self._open(kind, stage, total)
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

    def _open(self, kind: str, stage: str, total: int) -> None:
        from tqdm import tqdm

        self._close()
        self._kind = kind
        is_bytes = stage in BYTE_STAGES and total > 1
        self._bar = tqdm(
            desc=stage,
            total=total,
            unit="B" if is_bytes else "step",
            unit_scale=is_bytes,
            disable=None,  # hidden unless stderr is a terminal
            leave=False,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._kind = None, None
