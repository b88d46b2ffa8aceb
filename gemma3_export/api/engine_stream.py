"""A request of an engine, as its caller sees it: text, events and result, in threads or asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Self

from gemma3_export.runtimes.generation.request import (
    Completion,
    Failure,
    RequestState,
    TokenEvent,
)

__all__ = ["EngineStream", "EventChannel", "TokenEvents"]


class EventChannel:
    """Carries the events of one request from the engine's thread to threads and event loops."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[TokenEvent] = deque()
        self._outcome: Completion | Exception | None = None
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def put(self, event: TokenEvent | Completion | Failure) -> None:
        """Add an event; a completion or a failure is the last one."""
        with self._changed:
            if isinstance(event, TokenEvent):
                self._events.append(event)
            else:
                self._outcome = event.error if isinstance(event, Failure) else event
            self._changed.notify_all()
            sleepers, self._sleepers = self._sleepers, []
        for loop, sleeper in sleepers:
            try:
                loop.call_soon_threadsafe(_wake, sleeper)
            except RuntimeError:  # the event loop was closed, so nobody waits there
                continue

    def next_event(self) -> TokenEvent | None:
        """Wait for the next event; None after the last one.

        Raises:
            Exception: the request failed.
        """
        with self._changed:
            self._changed.wait_for(self._has_news)
            return self._take()

    async def next_event_async(self) -> TokenEvent | None:
        """Do the same as :meth:`next_event` without blocking the event loop."""
        while not self._has_news():
            await self._sleep(self._has_news)
        with self._changed:
            return self._take()

    def outcome(self, timeout_s: float | None) -> Completion:
        """Wait for the end, and return the result.

        Raises:
            TimeoutError: the request has not ended in time; it continues.
            Exception: the request failed.
        """
        with self._changed:
            if not self._changed.wait_for(self._has_ended, timeout_s):
                raise TimeoutError(f"the request has not ended after {timeout_s} s")
        return self._result()

    async def outcome_async(self) -> Completion:
        """Do the same as :meth:`outcome` without blocking the event loop."""
        while not self._has_ended():
            await self._sleep(self._has_ended)
        return self._result()

    def _has_news(self) -> bool:
        return bool(self._events) or self._has_ended()

    def _has_ended(self) -> bool:
        return self._outcome is not None

    def _take(self) -> TokenEvent | None:
        if self._events:
            return self._events.popleft()
        self._result()
        return None

    def _result(self) -> Completion:
        assert self._outcome is not None
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    async def _sleep(self, is_awake: Callable[[], bool]) -> None:
        """Sleep until the next event, unless it is there already."""
        loop = asyncio.get_running_loop()
        entry = (loop, loop.create_future())
        with self._changed:
            if is_awake():
                return
            self._sleepers.append(entry)
        try:
            await entry[1]
        finally:
            with self._changed:
                if entry in self._sleepers:
                    self._sleepers.remove(entry)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


class TokenEvents(Iterator[TokenEvent], AsyncIterator[TokenEvent]):
    """The events of a stream, for ``for`` and ``async for``."""

    def __init__(self, stream: EngineStream) -> None:
        self._stream = stream

    def __next__(self) -> TokenEvent:
        event = self._stream.next_event()
        if event is None:
            raise StopIteration
        return event

    async def __anext__(self) -> TokenEvent:
        event = await self._stream.next_event_async()
        if event is None:
            raise StopAsyncIteration
        return event


class EngineStream(Iterator[str], AsyncIterator[str]):
    """A request of an engine: iterate it for text, or wait for its result.

    Iterate with ``for`` or ``async for``, over the text or over :meth:`events`. The request ends
    when a ``with`` or ``async with`` block is left, when a task that waits for it is cancelled, and
    when the stream is garbage-collected.

    Args:
        channel: brings the events.
        state: the request.
        cancel: ends the request.
        owner: kept alive as long as the stream.
    """

    def __init__(
        self,
        channel: EventChannel,
        state: RequestState,
        cancel: Callable[[], None],
        owner: object,
    ) -> None:
        self._channel = channel
        self._state = state
        self._cancel = cancel
        self._owner = owner

    @property
    def completion(self) -> Completion:
        """The result so far; its finish reason is ``cancelled`` until the end."""
        return self._state.completion()

    def events(self) -> TokenEvents:
        """Return the tokens with their texts and log-probabilities, instead of the text alone."""
        return TokenEvents(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the result.

        Args:
            timeout: seconds; None waits until the request ends.

        Raises:
            TimeoutError: the request has not ended in time; it continues.
            Gemma3ExportError: the request failed.
        """
        return self._channel.outcome(timeout)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._outcome().__await__()

    def cancel(self) -> None:
        """End the request; its slot is free after the step that is running."""
        self._cancel()

    def next_event(self) -> TokenEvent | None:
        """Wait for the next event; None after the last one."""
        return self._channel.next_event()

    async def next_event_async(self) -> TokenEvent | None:
        """Do the same without blocking the event loop; ends the request if it is cancelled."""
        try:
            return await self._channel.next_event_async()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __next__(self) -> str:
        while (event := self.next_event()) is not None:
            if event.text:
                return event.text
        raise StopIteration

    async def __anext__(self) -> str:
        while (event := await self.next_event_async()) is not None:
            if event.text:
                return event.text
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()

    async def _outcome(self) -> Completion:
        try:
            return await self._channel.outcome_async()
        except asyncio.CancelledError:
            self.cancel()
            raise
