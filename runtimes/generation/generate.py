"""Generate for prompts that are all known in advance, in the caller's thread."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.kept_cache import KeptCache
from gemma3_export.runtimes.generation.loop import GenerationLoop
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.prepare import (
    GenerationOptions,
    check_prompts,
    choose_capacity,
    prepare_request,
)
from gemma3_export.runtimes.generation.request import (
    Completion,
    Failure,
    RequestState,
    StreamingDecoder,
    TokenConstraint,
    TokenEvent,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.scheduler import ScheduledRequest
from gemma3_export.runtimes.generation.speculation import Drafter
from gemma3_export.runtimes.protocol import IntArray, KVCache, Runtime

__all__ = ["Cancel", "Event", "Generation", "generate", "generate_each"]

Event = TokenEvent | Completion
Cancel = threading.Event | Callable[[], bool]


class Generation(Iterator[Event]):
    """A running generation: iterate over its events, or ``collect()`` the results.

    After ``close()``, Ctrl-C or an error, ``completions`` is what was generated until then.

    Args:
        requests: the requests that ``events`` advances.
        events: what drives the loop.
        closing: set by ``close()``, so that the loop ends with the step that is running.
    """

    def __init__(
        self,
        requests: Sequence[RequestState],
        events: Generator[Event, None, None],
        closing: threading.Event,
    ) -> None:
        self._requests = requests
        self._events = events
        self._closing = closing
        self._lock = threading.RLock()  # a signal handler may close amid a step of its own thread

    def __next__(self) -> Event:
        with self._lock:
            return next(self._events)

    def close(self) -> None:
        """Stop and release the cache; any thread may, and waits for the step that is running."""
        self._closing.set()
        with self._lock:
            if inspect.getgeneratorstate(self._events) != inspect.GEN_RUNNING:
                self._events.close()

    def collect(self) -> list[Completion]:
        """Run to the end and return one completion per prompt, in order."""
        for _ in self:
            pass
        return self.completions

    @property
    def completions(self) -> list[Completion]:
        """The results so far, in order; requests that have not ended count as cancelled."""
        return [request.completion() for request in self._requests]


def generate(
    runtime: Runtime,
    prompts: Sequence[Sequence[int] | IntArray],
    sampling: SamplingParams | Sequence[SamplingParams],
    options: GenerationOptions,
    *,
    detokenize: Callable[[], StreamingDecoder] | None = None,
    constraint: Callable[[], TokenConstraint] | None = None,
    drafter: Callable[[], Drafter] | None = None,
    prefix_cache: PrefixCache | None = None,
    kept_cache: KeptCache | None = None,
    cancel: Cancel | None = None,
    prefill_progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue every prompt. Inputs are checked here; iterating the result does the work.

    Each prompt yields one ``TokenEvent`` per token and ends with one ``Completion``. A prompt's
    result does not depend on the other prompts, nor (up to rounding) on the size of the prefill
    chunks.

    Args:
        runtime: the backend.
        prompts: B token sequences of any length.
        sampling: one per prompt, or one for all. One for all gives prompt i the ``request_index``
            of ``sampling`` plus i, so that equal prompts differ; with one per prompt, each is
            sampled as if it were alone.
        options: limits and stop conditions.
        detokenize: makes a fresh decoder per prompt; None leaves all text empty.
        constraint: makes a fresh constraint per prompt; None allows every token.
        drafter: makes a fresh drafter per prompt, such as ``PromptLookup``, for speculative
            decoding; in float32 it changes the speed and, up to rounding, nothing else. Drafts are
            verified while only one prompt is still being continued.
        prefix_cache: this runtime's cache of prompt prefixes. Prompts start from what it holds and
            are added to it once they are prefilled, so that prompts of one call share too. It finds
            only prefixes that were computed with the same ``prefill_chunk``.
        kept_cache: continue the cache of an earlier generation with a single prompt, such as the
            next turn of a conversation; only tokens that it does not hold are computed.
        cancel: an event or a function, checked before every prefill chunk and decoding step.
        prefill_progress: called with the number of prompt tokens processed and their total.

    Raises:
        InputError: an argument is impossible, or a prompt does not fit.
    """
    if prefix_cache is not None:
        prefix_cache.require_runtime(runtime)
    prompt_ids = check_prompts(prompts, runtime.config)
    if kept_cache is not None and len(prompt_ids) != 1:
        raise InputError(
            f"a kept cache continues one prompt, and there are {len(prompt_ids)}; generate them "
            "one after the other"
        )
    capacity = choose_capacity(prompt_ids, options, runtime.config)
    requests = [
        prepare_request(
            runtime,
            index,
            ids,
            params,
            options,
            capacity,
            detokenize=detokenize,
            constraint=constraint,
            drafter=drafter,
        )
        for index, (ids, params) in enumerate(
            zip(prompt_ids, _params_per_prompt(sampling, len(prompt_ids)), strict=True)
        )
    ]
    closing = threading.Event()
    is_cancelled = _either(closing, cancel)

    def run(cache: KVCache) -> Generator[Event, None, None]:
        loop = GenerationLoop(runtime, cache, prefix_cache=prefix_cache)
        return _drive(loop, requests, is_cancelled, prefill_progress)

    if kept_cache is None:
        events = _with_new_cache(runtime, len(requests), capacity, run)
    else:
        events = _with_kept_cache(kept_cache, runtime, requests[0].state, capacity, run)
    return Generation([request.state for request in requests], events, closing)


def generate_each(
    loop: GenerationLoop, requests: Iterable[ScheduledRequest]
) -> Generator[Event, None, None]:
    """Yield the events of any number of requests, each taken from ``requests`` when a row is free.

    Raises:
        Exception: a request or the runtime failed.
    """
    upcoming = iter(requests)
    while True:
        while loop.scheduler.has_free_row and (request := next(upcoming, None)) is not None:
            loop.submit(request)
        if loop.is_idle:
            return
        for event in loop.step():
            if isinstance(event, Failure):
                raise event.error
            yield event


Run = Callable[[KVCache], Generator[Event, None, None]]


def _with_new_cache(
    runtime: Runtime, rows: int, capacity: int, run: Run
) -> Generator[Event, None, None]:
    yield from run(runtime.new_cache(rows, capacity))


def _with_kept_cache(
    kept: KeptCache, runtime: Runtime, request: RequestState, capacity: int, run: Run
) -> Generator[Event, None, None]:
    cache = kept.take(runtime, request.prompt_ids, capacity)
    try:
        yield from run(cache)
    except GeneratorExit:  # between two events, where the cache is consistent
        kept.give_back(cache, request)
        raise
    kept.give_back(cache, request)


def _drive(
    loop: GenerationLoop,
    requests: Sequence[ScheduledRequest],
    is_cancelled: Callable[[], bool],
    prefill_progress: Callable[[int, int], None] | None,
) -> Generator[Event, None, None]:
    """Yield all events in the order in which they happen."""
    total = sum(request.state.prompt_ids.size for request in requests)
    done = 0
    for request in requests:
        loop.submit(request)
    while not loop.is_idle:
        if is_cancelled():
            for request in requests:
                if request.state.finish_reason is None:
                    yield loop.cancel(request)
            return
        events = loop.step()
        if prefill_progress is not None:
            before, done = done, sum(request.prefilled_tokens for request in requests)
            if done > before:
                prefill_progress(done, total)
        for event in events:
            if isinstance(event, Failure):
                raise event.error
            yield event


def _either(closing: threading.Event, cancel: Cancel | None) -> Callable[[], bool]:
    """Return a function that tells whether one of the two is set.

    Raises:
        InputError: ``cancel`` is neither an event nor a function.
    """
    if cancel is None:
        return closing.is_set
    is_set = cancel.is_set if isinstance(cancel, threading.Event) else cancel
    if not callable(is_set):
        raise InputError(f"cancel is {cancel!r:.60}; give a threading.Event or a function")
    return lambda: closing.is_set() or is_set()


def _params_per_prompt(
    sampling: SamplingParams | Sequence[SamplingParams], count: int
) -> Sequence[SamplingParams]:
    if isinstance(sampling, SamplingParams):
        first = sampling.request_index
        return [replace(sampling, request_index=first + index) for index in range(count)]
    if len(sampling) != count:
        raise InputError(
            f"there are {len(sampling)} sampling parameters for {count} prompts; give one or "
            "one for each"
        )
    return sampling
