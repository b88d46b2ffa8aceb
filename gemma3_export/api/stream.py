"""The text of a running generation, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from gemma3_export.runtimes.generation.generate import Generation
from gemma3_export.runtimes.generation.request import Completion, TokenEvent

__all__ = ["TextStream"]


class TextStream(Iterator[str]):
    """The text of one generation, piece by piece.

    Iterate it for text as it is certain; ``completion`` is the result so far, complete once the
    iteration has ended. ``close`` stops early, and so does leaving a ``with`` block.

    Args:
        generation: the generation of one prompt.
        on_end: receives the completion when the stream has ended or is closed, or None if it
            failed.
    """

    def __init__(
        self, generation: Generation, on_end: Callable[[Completion | None], None] | None = None
    ) -> None:
        self._generation = generation
        self._on_end = on_end
        self._ending = threading.Lock()

    def __next__(self) -> str:
        try:
            for event in self._generation:
                if isinstance(event, TokenEvent) and event.text:
                    return event.text
        except BaseException:
            self._end(has_failed=True)
            raise
        self._end()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; ``completion`` keeps the text so far. Any thread may close a stream."""
        self._generation.close()
        self._end()

    @property
    def completion(self) -> Completion:
        """The result so far; its finish reason is ``cancelled`` until the end."""
        return self._generation.completions[0]

    def _end(self, has_failed: bool = False) -> None:
        with self._ending:
            on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(None if has_failed else self.completion)
