"""Decide which request gets which row of the cache, and what the next step computes.

The scheduler only counts. It never touches the cache or the runtime, so a plan can be read and
tested as data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.prefix_cache import ChunkSizes
from gemma3_export.runtimes.generation.request import RequestState
from gemma3_export.runtimes.generation.speculation import Speculation

__all__ = [
    "DecodeStep",
    "Plan",
    "PrefillChunk",
    "ScheduledRequest",
    "Scheduler",
    "in_turns",
    "prompts_first",
    "require_fits",
]

NO_ROW = -1


@dataclass(eq=False, kw_only=True, slots=True)
class ScheduledRequest:
    """A request on its way from the queue through one row of the cache."""

    state: RequestState
    prefill_chunk: int  # chunks end at multiples of it, whatever else runs
    idle_chunk: int  # a multiple of it: the size of chunks for which no answer waits
    speculation: Speculation | None = None
    submitted_s: float = 0.0  # perf_counter() at submission
    row: int = NO_ROW
    prefilled_tokens: int = 0  # of the prompt, in the cache
    continues_row: bool = False  # its row was kept from an earlier generation

    @property
    def chunk_sizes(self) -> ChunkSizes:
        """The sizes of its chunks, by which prefixes are kept."""
        return self.prefill_chunk, self.idle_chunk

    @property
    def remaining_prompt(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return self.state.prompt_ids.size - self.prefilled_tokens

    def next_chunk(self, *, is_idle: bool = False) -> PrefillChunk:
        """Return the next chunk of the prompt, which ends at a multiple of the chunk size.

        Args:
            is_idle: no answer waits for it.
        """
        start, size = self.prefilled_tokens, self.idle_chunk if is_idle else self.prefill_chunk
        stop = min(start - start % self.prefill_chunk + size, self.state.prompt_ids.size)
        return PrefillChunk(request=self, start=start, stop=stop, is_idle=is_idle)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillChunk:
    """A step that computes the prompt tokens [start, stop) of one request."""

    request: ScheduledRequest
    start: int
    stop: int
    is_idle: bool  # no answer waits for it

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this chunk."""
        return self.stop == self.request.state.prompt_ids.size


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeStep:
    """A step that computes the next token of every request whose prompt is done."""

    requests: tuple[ScheduledRequest, ...]  # in the order of their rows, which are adjacent
    swaps: tuple[tuple[int, int], ...]  # rows to exchange first, to make them so


Plan = PrefillChunk | DecodeStep


class Scheduler:
    """The requests that wait, those whose prompts are being computed, and those that decode.

    Args:
        rows: rows of the cache.
        row_tokens: tokens that a row can hold.
        plan_next: :func:`prompts_first` or :func:`in_turns`.
        max_tokens: tokens that all running requests together may need; None is what fits the rows.
    """

    def __init__(
        self,
        rows: int,
        row_tokens: int,
        plan_next: Callable[[Scheduler], Plan | None],
        *,
        max_tokens: int | None = None,
    ) -> None:
        self.rows: list[ScheduledRequest | None] = [None] * rows
        self.waiting: deque[ScheduledRequest] = deque()
        self.prefilling: list[ScheduledRequest] = []  # in order of arrival
        self.decoding: list[ScheduledRequest] = []
        self.row_tokens = row_tokens
        self.max_tokens = rows * row_tokens if max_tokens is None else max_tokens
        self.chunks = 0  # planned so far
        self.last: Plan | None = None
        self._plan_next = plan_next

    @property
    def is_idle(self) -> bool:
        """Whether there is no request."""
        return not (self.waiting or self.prefilling or self.decoding)

    @property
    def has_free_row(self) -> bool:
        """Whether a request that is submitted now need not wait for another to end."""
        return self.rows.count(None) > len(self.waiting)

    @property
    def reserved_tokens(self) -> int:
        """Tokens that the running requests may need at most."""
        return sum(request.state.max_cached_tokens for request in self.running)

    @property
    def running(self) -> list[ScheduledRequest]:
        """The requests that have a row."""
        return [*self.prefilling, *self.decoding]

    def submit(self, request: ScheduledRequest) -> None:
        """Put a request at the end of the queue.

        Raises:
            InputError: it would not fit even if it were alone.
        """
        require_fits(request, min(self.row_tokens, self.max_tokens))
        request.submitted_s = perf_counter()
        self.waiting.append(request)

    def admit(self) -> list[ScheduledRequest]:
        """Give free rows to waiting requests, and return these.

        Nobody overtakes: a large request at the head of the queue waits until the others have
        freed what it needs.
        """
        admitted = []
        while self.waiting and None in self.rows:
            needed = self.waiting[0].state.max_cached_tokens
            if self.reserved_tokens + needed > self.max_tokens:
                break
            request = self.waiting.popleft()
            request.row = self.rows.index(None)
            self.rows[request.row] = request
            self.prefilling.append(request)
            admitted.append(request)
        return admitted

    def plan(self) -> Plan | None:
        """Return what to compute next; None if nothing is running."""
        self.last = self._plan_next(self)
        self.chunks += isinstance(self.last, PrefillChunk)
        return self.last

    def begin_decoding(self, request: ScheduledRequest) -> None:
        """Move a request on whose prompt is in the cache."""
        self.prefilling.remove(request)
        self.decoding.append(request)

    def release(self, request: ScheduledRequest) -> None:
        """Remove a request, wherever it is; its row is free."""
        for group in (self.waiting, self.prefilling, self.decoding):
            if request in group:
                group.remove(request)
        if request.row != NO_ROW:
            self.rows[request.row], request.row = None, NO_ROW

    def decode_step(self) -> DecodeStep | None:
        """Return a step of all decoding requests; None if there are none."""
        if not self.decoding:
            return None
        swaps = self._make_adjacent()
        self.decoding.sort(key=lambda request: request.row)
        return DecodeStep(requests=tuple(self.decoding), swaps=tuple(swaps))

    def _make_adjacent(self) -> list[tuple[int, int]]:
        """Give adjacent rows to the requests that decode; return the rows to exchange for that."""
        taken, count = {request.row for request in self.decoding}, len(self.decoding)
        ranges = (range(first, first + count) for first in range(len(self.rows) - count + 1))
        target = set(min(ranges, key=lambda rows: len(taken.difference(rows))))
        swaps = list(zip(sorted(taken - target), sorted(target - taken), strict=True))
        for row, other in swaps:
            rows = self.rows
            rows[row], rows[other] = rows[other], rows[row]
            for at in (row, other):
                if (request := rows[at]) is not None:
                    request.row = at
        return swaps


def require_fits(request: ScheduledRequest, limit: int) -> None:
    """Reject a request that may need more than ``limit`` tokens of the cache.

    Raises:
        InputError: it may.
    """
    needed = request.state.max_cached_tokens
    if needed > limit:
        raise InputError(
            f"prompt and answer may need {needed} tokens of the cache, and a request can have "
            f"{limit}; shorten the prompt, or ask for fewer new tokens"
        )


def prompts_first(scheduler: Scheduler) -> Plan | None:
    """Plan whole prompts in order of arrival, then tokens: the fewest steps in total."""
    if scheduler.prefilling:
        return scheduler.prefilling[0].next_chunk()
    return scheduler.decode_step()


def in_turns(scheduler: Scheduler) -> Plan | None:
    """Plan one chunk of a prompt after each decode step, so that prompts do not stall answers.

    While no answer is running, chunks are longer, which takes less time in total.

    Half of the chunks go to the prompt that has the least left, so that a short prompt does not
    wait for a long one, and the other half to the oldest, so that short ones do not starve it.
    """
    has_had_chunk = isinstance(scheduler.last, PrefillChunk)
    if not scheduler.prefilling or (scheduler.decoding and has_had_chunk):
        return scheduler.decode_step()
    is_idle = not scheduler.decoding
    if scheduler.chunks % 2:
        return scheduler.prefilling[0].next_chunk(is_idle=is_idle)
    shortest = min(scheduler.prefilling, key=lambda request: request.remaining_prompt)
    return shortest.next_chunk(is_idle=is_idle)
