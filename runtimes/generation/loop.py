"""The generation loop: prefill in chunks, decode in a batch, stream, stop and cancel.

Shapes: B requests, T new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.candidates import (
    Candidates,
    SelectsCandidates,
    candidates_needed,
)
from gemma3_export.runtimes.generation.kept_cache import KeptCache
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.request import (
    Completion,
    FinishReason,
    RequestState,
    StopTexts,
    StreamingDecoder,
    TokenConstraint,
    TokenEvent,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.speculation import (
    CANDIDATE_COSTS,
    MAX_DRAFT_TOKENS,
    PLAIN_COSTS,
    Drafter,
    Speculation,
    StepCosts,
)
from gemma3_export.runtimes.protocol import CacheVariants, IntArray, KVCache, Logits, Runtime

__all__ = [
    "Cancel",
    "Completion",
    "DecodingLoop",
    "Event",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "RequestState",
    "StopTexts",
    "StreamingDecoder",
    "TokenConstraint",
    "TokenEvent",
    "generate",
]

Event = TokenEvent | Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingLoop:
    """One batch of requests, prefilled and decoded by a backend.

    ``_prefill`` and ``_decode`` return only the logits that follow each request's newest token.
    With speculation ``_decode`` may have them already; tokens are still accepted and reported one
    by one, so events, stops and cancellations are the same as without it.
    """

    runtime: Runtime
    requests: Sequence[RequestState]
    capacity: int
    prefill_chunk: int
    is_cancelled: Callable[[], bool]
    prefill_progress: Callable[[int, int], None] | None
    speculations: Sequence[Speculation | None]  # one per request
    prefix_cache: PrefixCache | None
    kept_cache: KeptCache | None

    def run(self) -> Generator[Event, None, None]:
        """Yield all events in the order in which they happen."""
        kept = self.kept_cache
        if kept is None:
            yield from self._run(self.runtime.new_cache(len(self.requests), self.capacity))
            return
        (request,) = self.requests
        cache = kept.take(self.runtime, request.prompt_ids, self.capacity)
        try:
            yield from self._run(cache)
        except GeneratorExit:  # between two events, where the cache is consistent
            kept.give_back(cache, request)
            raise
        kept.give_back(cache, request)

    def _run(self, cache: KVCache) -> Generator[Event, None, None]:
        started = perf_counter()
        for request in self.requests:
            logits = self._prefill(request, cache)
            if logits is None:
                yield from self._abandon()
                return
            event = request.accept(logits)
            request.time_to_first_token_s = perf_counter() - started
            yield from _report(request, event)
        while active := [request for request in self.requests if request.finish_reason is None]:
            if self.is_cancelled():
                yield from self._abandon()
                return
            begun = perf_counter()
            # All rows accept before any is reported, so that an interruption loses no token.
            rows = self._decode(active, cache)
            events = [request.accept(row) for request, row in zip(active, rows, strict=True)]
            elapsed = perf_counter() - begun
            for request, event in zip(active, events, strict=True):
                request.decode_s += elapsed
                if request.finish_reason is not None and request.drafted_tokens:
                    self._drop_rejected(request, cache)
                yield from _report(request, event)

    def _prefill(self, request: RequestState, cache: KVCache) -> Logits | None:
        """Feed the prompt to the request's row; return logits [V] after it, None if cancelled.

        Chunks end at multiples of their size, regardless of where a reused prefix ends.
        """
        sizes = [other.prompt_ids.size for other in self.requests]
        row = request.index if len(self.requests) > 1 else None
        kept = fed = request.reused_tokens = int(cache.lengths[request.index])
        if not kept:
            fed = self._load_prefix(request, cache)
        while True:
            if self.is_cancelled():
                return None
            stop = fed - fed % self.prefill_chunk + self.prefill_chunk
            chunk = request.prompt_ids[None, fed:stop]
            begun = perf_counter()
            logits = self.runtime.step(chunk, cache, num_logits=1, row=row)
            request.prefill_s += perf_counter() - begun
            fed += chunk.size
            if self.prefill_progress is not None:
                self.prefill_progress(sum(sizes[: request.index]) + fed, sum(sizes))
            if fed >= request.prompt_ids.size:
                if not kept:  # else some tokens were not computed in whole prefill chunks
                    self._store_prefix(request, cache)
                last: Logits = logits[0, -1]
                return last

    def _load_prefix(self, request: RequestState, cache: KVCache) -> int:
        """Load the stored prefix of the prompt, and return its length."""
        if self.prefix_cache is None:
            return 0
        begun = perf_counter()
        request.reused_tokens = self.prefix_cache.load(
            cache, request.index, request.prompt_ids, self.prefill_chunk
        )
        request.prefill_s += perf_counter() - begun
        return request.reused_tokens

    def _store_prefix(self, request: RequestState, cache: KVCache) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.store(cache, request.index, request.prompt_ids, self.prefill_chunk)

    def _decode(
        self, active: Sequence[RequestState], cache: KVCache
    ) -> Sequence[Logits | Candidates]:
        """Feed each active request its newest token; return its logits [V] or candidates.

        Rows that have ended are fed padding, which costs less than splitting the batch. If one of
        them has no room left, the active rows are stepped one by one. The only active row may use
        speculation.
        """
        if len(active) == 1:
            logits = self._speculate(active[0], cache)
            if logits is not None:
                return [logits]
        if int(cache.lengths.max()) < cache.capacity:
            chosen = self._candidates(active, cache)
            if chosen is not None:
                return chosen
            if len(active) > 1:
                logits = self.runtime.step(self._newest(active), cache, num_logits=1)
                return [logits[request.index, -1] for request in active]
        return [self._step_row(request, cache, [])[0] for request in active]

    def _newest(self, active: Sequence[RequestState]) -> IntArray:
        """Return each active request's newest token [B, 1], and padding for the others."""
        ids = np.full((len(self.requests), 1), self.runtime.config.pad_token_id, np.int64)
        for request in active:
            ids[request.index] = request.tokens[-1].token_id
        return ids

    def _candidates(
        self, active: Sequence[RequestState], cache: KVCache
    ) -> Sequence[Logits | Candidates] | None:
        """Return what the backend selected for each request; None if logits are needed."""
        if not isinstance(self.runtime, SelectsCandidates):
            return None
        if any(request.needs_all_logits for request in active):
            return None
        params = [request.params for request in active]
        chosen = self.runtime.step_candidates(self._newest(active), cache, params)
        return None if chosen is None else [chosen[request.index] for request in active]

    def _speculate(self, request: RequestState, cache: KVCache) -> Logits | None:
        """Return logits [V] after the request's newest token, by verifying a draft if necessary.

        None if there is nothing to verify.
        """
        speculation = self.speculations[request.index]
        if speculation is None:
            return None
        verified = speculation.verified_logits()
        if verified is not None:
            return verified
        self._drop_rejected(request, cache)
        draft = speculation.draft()
        if not draft:
            return None
        logits = self._step_row(request, cache, draft)
        speculation.keep(draft, logits[1:])
        first: Logits = logits[0]
        return first

    def _step_row(self, request: RequestState, cache: KVCache, draft: Sequence[int]) -> Logits:
        """Feed one request its newest token and a draft; return logits [1 + draft, V]."""
        logits: Logits = self.runtime.step(
            np.array([[request.tokens[-1].token_id, *draft]], np.int64),
            cache,
            num_logits=1 + len(draft),
            row=request.index if len(self.requests) > 1 else None,
        )[0]
        return logits

    def _drop_rejected(self, request: RequestState, cache: KVCache) -> None:
        if cache.lengths[request.index] > request.fed_tokens:
            cache.truncate(request.index, request.fed_tokens)

    def _abandon(self) -> Iterator[Completion]:
        for request in self.requests:
            if request.finish_reason is None:
                request.finish_reason = "cancelled"
                yield request.completion()


def _report(request: RequestState, event: TokenEvent) -> Iterator[Event]:
    yield event
    if request.finish_reason is not None:
        yield request.completion()


Cancel = threading.Event | Callable[[], bool]


class Generation(Iterator[Event]):
    """A running generation: iterate over its events, or ``collect()`` the results.

    After ``close()``, Ctrl-C or an error, ``completions`` is what was generated until then.

    Args:
        requests: the requests that ``events`` advances.
        events: the loop.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """Limits of a generation, the same for all of its prompts.

    Args:
        max_new_tokens: the most tokens to generate per prompt. Generation also ends, with the
            finish reason ``length``, where the cache or the model's context is full.
        stop_token_ids: tokens that end a prompt's generation; None is the config's
            ``eos_token_id``, empty is none.
        stop_texts: texts that end a prompt's generation; they need a tokenizer.
        prefill_chunk: prompt tokens to process per step.
        capacity: tokens of prompt and answer that a row of the cache holds; None is what the
            longest prompt needs, within the model's context.
        max_draft_tokens: the most tokens to draft at once; sliding-window caches, which cannot
            take back more, draft less than a window.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...] | None = None
    stop_texts: tuple[str, ...] = ()
    prefill_chunk: int = 512
    capacity: int | None = None
    max_draft_tokens: int = MAX_DRAFT_TOKENS

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_chunk", "max_draft_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if isinstance(self.stop_texts, str) or not all(self.stop_texts):
            raise InputError(
                f"stop_texts is {self.stop_texts!r}; give a list of texts that are not empty"
            )


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
    if options.stop_texts and detokenize is None:
        raise InputError("stop_texts need a tokenizer to see the text; give detokenize")
    prompt_ids = _check_prompts(prompts, runtime.config)
    if kept_cache is not None and len(prompt_ids) != 1:
        raise InputError(
            f"a kept cache continues one prompt, and there are {len(prompt_ids)}; generate them "
            "one after the other"
        )
    capacity = _check_capacity(prompt_ids, options, runtime.config)
    stop_token_ids = options.stop_token_ids
    requests = [
        RequestState(
            index,
            ids,
            params,
            max_new_tokens=min(options.max_new_tokens, capacity - ids.size + 1),  # the last: unfed
            stop_token_ids=runtime.config.eos_token_id
            if stop_token_ids is None
            else stop_token_ids,
            stop_texts=options.stop_texts,
            decoder=detokenize() if detokenize else None,
            constraint=constraint() if constraint else None,
        )
        for index, (ids, params) in enumerate(
            zip(prompt_ids, _params_per_prompt(sampling, len(prompt_ids)), strict=True)
        )
    ]
    longest_draft = _longest_draft(runtime, options.max_draft_tokens)
    closing = threading.Event()
    loop = DecodingLoop(
        runtime=runtime,
        requests=requests,
        capacity=capacity,
        prefill_chunk=options.prefill_chunk,
        is_cancelled=_either(closing, cancel),
        prefill_progress=prefill_progress,
        speculations=[
            Speculation(request, drafter(), longest_draft, _step_costs(runtime, request))
            if drafter and longest_draft
            else None
            for request in requests
        ],
        prefix_cache=prefix_cache,
        kept_cache=kept_cache,
    )
    return Generation(requests, loop.run(), closing)


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


def _step_costs(runtime: Runtime, request: RequestState) -> StepCosts:
    """Return the costs of verifying drafts, which depend on whether plain steps use candidates."""
    chooses = isinstance(runtime, SelectsCandidates) and runtime.selects_candidates
    if request.needs_all_logits or candidates_needed(request.params) is None:
        return PLAIN_COSTS
    return CANDIDATE_COSTS if chooses else PLAIN_COSTS


def _check_prompts(
    prompts: Sequence[Sequence[int] | IntArray], config: Gemma3Config
) -> list[IntArray]:
    """Return each prompt as [T] int64."""
    if not len(prompts):
        raise InputError("there is no prompt; give at least one")
    checked = []
    for number, prompt in enumerate(prompts, 1):  # numbered from 1 for people
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise InputError(f"prompt {number} is empty; give at least one token, such as <bos>")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                f"prompt {number} has shape {ids.shape} and type {ids.dtype}; "
                "each prompt must be a sequence of token ids"
            )
        bad = ids[(ids < 0) | (ids >= config.vocab_size)]
        if bad.size:
            raise InputError(
                f"prompt {number} holds token id {bad[0]}, outside the model's vocabulary of "
                f"{config.vocab_size}; was it encoded with another model's tokenizer?"
            )
        checked.append(ids.astype(np.int64))
    return checked


def _check_capacity(
    prompt_ids: Sequence[IntArray], options: GenerationOptions, config: Gemma3Config
) -> int:
    """Return the capacity to use, which every prompt fits."""
    capacity = options.capacity
    limit = config.max_position_embeddings
    if capacity is not None and not 1 <= capacity <= limit:
        raise InputError(f"capacity is {capacity}; it must be from 1 to the model's {limit} tokens")
    lengths = [ids.size for ids in prompt_ids]
    longest = max(lengths)
    if longest > (capacity or limit):
        what = "the model's context" if capacity is None else "the cache's capacity"
        raise InputError(
            f"prompt {lengths.index(longest) + 1} has {longest} tokens, more than {what} of "
            f"{capacity or limit}; shorten the prompt"
        )
    return capacity or min(longest + options.max_new_tokens, limit)


def _longest_draft(runtime: Runtime, max_draft_tokens: int) -> int:
    """Return the longest draft that can be cut off again: with the token before it, one window."""
    if isinstance(runtime, CacheVariants) and runtime.uses_sliding_window_cache:
        return min(max_draft_tokens, runtime.config.sliding_window - 1)
    return max_draft_tokens


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
