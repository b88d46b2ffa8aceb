"""The one generation loop: prefill in chunks, decode in a batch, stream, stop, be interrupted.

Shapes: B requests, T new tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.runtimes.candidates import Candidates, ChoosesCandidates
from gemma3_export.runtimes.protocol import IntArray, KVCache, Logits, Runtime
from gemma3_export.runtimes.request_state import (
    Completion,
    FinishReason,
    RequestState,
    StopTexts,
    StreamingDecoder,
    TokenEvent,
)
from gemma3_export.runtimes.sampling import SamplingParams

__all__ = [
    "Cancel",
    "Completion",
    "Event",
    "FinishReason",
    "Generation",
    "RequestState",
    "StopTexts",
    "StreamingDecoder",
    "TokenEvent",
    "generate",
]

Event = TokenEvent | Completion
Cancel = threading.Event | Callable[[], bool]


class Generation(Iterator[Event]):
    """A running generation: iterate it for events, or ``collect()`` the results.

    After an interruption, be it ``close()``, Ctrl-C or an error, ``completions`` is what was
    produced until then.
    """

    def __init__(
        self, requests: Sequence[RequestState], events: Generator[Event, None, None]
    ) -> None:
        self._requests = requests
        self._events = events

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Stop now and let go of the cache."""
        self._events.close()

    def collect(self) -> list[Completion]:
        """Run to the end and return one completion a prompt, in the order of the prompts."""
        for _ in self:
            pass
        return self.completions

    @property
    def completions(self) -> list[Completion]:
        """The results so far, in the order of the prompts; what has not ended is cancelled."""
        return [request.completion() for request in self._requests]


def generate(
    runtime: Runtime,
    prompts: Sequence[Sequence[int] | IntArray],
    sampling: SamplingParams | Sequence[SamplingParams],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] | None = None,
    stop_texts: Sequence[str] = (),
    detokenize: Callable[[], StreamingDecoder] | None = None,
    prefill_chunk: int = 512,
    capacity: int | None = None,
    cancel: Cancel | None = None,
    prefill_progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue every prompt; the inputs are checked at once, the work is done by iterating.

    Each prompt gives its tokens as ``TokenEvent`` and ends with one ``Completion``. A prompt's
    result does not depend on the other prompts, nor (but for rounding) on ``prefill_chunk``.

    Args:
        runtime: the backend.
        prompts: B token sequences, of any lengths.
        sampling: one for each prompt, or one for all. One for all gives prompt i the
            ``request_index`` of ``sampling`` plus i, so that equal prompts differ; with one for
            each, every prompt is sampled as if it were alone.
        max_new_tokens: the most tokens to generate for a prompt. Generation also ends, with the
            reason ``length``, where the cache or the model's context is full.
        stop_token_ids: instead of the config's ``eos_token_id``; empty for none.
        stop_texts: texts that end a prompt's generation; they need ``detokenize``.
        detokenize: makes a fresh decoder for each prompt; without it all text is empty.
        prefill_chunk: tokens of a prompt to process at once.
        capacity: tokens of prompt and answer that a row of the cache holds; by default what the
            longest prompt needs, within the model's context.
        cancel: an event or a function, looked at before every prefill chunk and decoding step.
        prefill_progress: called with the prompt tokens processed and their total.

    Raises:
        InputError: an argument is impossible, or a prompt does not fit.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if isinstance(stop_texts, str) or not all(stop_texts):
        raise InputError(f"stop_texts is {stop_texts!r}; give a list of texts that are not empty")
    if stop_texts and detokenize is None:
        raise InputError("stop_texts need a tokenizer to see the text; give detokenize")
    prompt_ids = _check_prompts(prompts, runtime.config)
    capacity = _check_capacity(prompt_ids, max_new_tokens, capacity, runtime.config)
    requests = [
        RequestState(
            index,
            ids,
            params,
            max_new_tokens=min(max_new_tokens, capacity - ids.size + 1),  # the last is never fed
            stop_token_ids=runtime.config.eos_token_id
            if stop_token_ids is None
            else stop_token_ids,
            stop_texts=stop_texts,
            decoder=detokenize() if detokenize else None,
        )
        for index, (ids, params) in enumerate(
            zip(prompt_ids, _params_per_prompt(sampling, len(prompt_ids)), strict=True)
        )
    ]
    loop = _Loop(
        runtime=runtime,
        requests=requests,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
        cancel=cancel.is_set if isinstance(cancel, threading.Event) else cancel,
        prefill_progress=prefill_progress,
    )
    return Generation(requests, loop.run())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loop:
    """One batch on its way through a backend.

    The loop asks of ``_prefill`` and ``_decode`` only the logits that follow each request's last
    token. Reusing a cached prefix is a matter of the cache that ``run`` begins with. Speculation
    is a ``_decode`` that returns several positions a request, to be accepted one by one: the
    sampler's draws do not depend on how many were computed at once.
    """

    runtime: Runtime
    requests: Sequence[RequestState]
    capacity: int
    prefill_chunk: int
    cancel: Callable[[], bool] | None
    prefill_progress: Callable[[int, int], None] | None

    def run(self) -> Generator[Event, None, None]:
        """All events, in the order in which they happen."""
        started = perf_counter()
        cache = self.runtime.new_cache(len(self.requests), self.capacity)
        for request in self.requests:
            logits = self._prefill(request, cache)
            if logits is None:
                yield from self._abandon()
                return
            event = request.accept(logits)
            request.time_to_first_token_s = perf_counter() - started
            yield from _report(request, event)
        while active := [request for request in self.requests if request.finish_reason is None]:
            if self._is_cancelled():
                yield from self._abandon()
                return
            begun = perf_counter()
            # All rows accept before any is reported, so that an interruption loses no token.
            rows = self._decode(active, cache)
            events = [request.accept(row) for request, row in zip(active, rows, strict=True)]
            elapsed = perf_counter() - begun
            for request, event in zip(active, events, strict=True):
                request.decode_s += elapsed
                yield from _report(request, event)

    def _prefill(self, request: RequestState, cache: KVCache) -> Logits | None:
        """Feed the prompt to the request's row; [V] after its last token, None if cancelled."""
        sizes = [other.prompt_ids.size for other in self.requests]
        row = request.index if len(self.requests) > 1 else None
        fed = int(cache.lengths[request.index])
        while True:
            if self._is_cancelled():
                return None
            chunk = request.prompt_ids[None, fed : fed + self.prefill_chunk]
            begun = perf_counter()
            logits = self.runtime.step(chunk, cache, num_logits=1, row=row)
            request.prefill_s += perf_counter() - begun
            fed += chunk.size
            if self.prefill_progress is not None:
                self.prefill_progress(sum(sizes[: request.index]) + fed, sum(sizes))
            if fed >= request.prompt_ids.size:
                last: Logits = logits[0, -1]
                return last

    def _decode(
        self, active: Sequence[RequestState], cache: KVCache
    ) -> Sequence[Logits | Candidates]:
        """Feed each active request its last token; [V] for each, or what decides of them.

        Rows that have ended are fed padding along with the others, which costs less than to split
        the batch. When one of them has no room left for that, the active rows go one by one.
        """
        if int(cache.lengths.max()) < cache.capacity:
            ids = np.full((len(self.requests), 1), self.runtime.config.pad_token_id, np.int64)
            for request in active:
                ids[request.index] = request.tokens[-1].token_id
            if isinstance(self.runtime, ChoosesCandidates):
                params = [request.params for request in active]
                chosen = self.runtime.step_candidates(ids, cache, params)
                if chosen is not None:
                    return [chosen[request.index] for request in active]
            logits = self.runtime.step(ids, cache, num_logits=1)
            return [logits[request.index, -1] for request in active]
        return [
            self.runtime.step(
                np.array([[request.tokens[-1].token_id]], np.int64),
                cache,
                num_logits=1,
                row=request.index,
            )[0, -1]
            for request in active
        ]

    def _is_cancelled(self) -> bool:
        return self.cancel is not None and self.cancel()

    def _abandon(self) -> Iterator[Completion]:
        for request in self.requests:
            if request.finish_reason is None:
                request.finish_reason = "cancelled"
                yield request.completion()


def _report(request: RequestState, event: TokenEvent) -> Iterator[Event]:
    yield event
    if request.finish_reason is not None:
        yield request.completion()


def _check_prompts(
    prompts: Sequence[Sequence[int] | IntArray], config: Gemma3Config
) -> list[IntArray]:
    """Each prompt as [T] int64."""
    if not len(prompts):
        raise InputError("there is no prompt; give at least one")
    checked = []
    for index, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise InputError(f"prompt {index} is empty; give at least one token, such as <bos>")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                f"prompt {index} has shape {ids.shape} and type {ids.dtype}; "
                "each prompt must be a sequence of token ids"
            )
        bad = ids[(ids < 0) | (ids >= config.vocab_size)]
        if bad.size:
            raise InputError(
                f"prompt {index} holds token id {bad[0]}, outside the model's vocabulary of "
                f"{config.vocab_size}; was it encoded with another model's tokenizer?"
            )
        checked.append(ids.astype(np.int64))
    return checked


def _check_capacity(
    prompt_ids: Sequence[IntArray], max_new_tokens: int, capacity: int | None, config: Gemma3Config
) -> int:
    """The capacity to use, which every prompt fits."""
    limit = config.max_position_embeddings
    if capacity is not None and not 1 <= capacity <= limit:
        raise InputError(f"capacity is {capacity}; it must be from 1 to the model's {limit} tokens")
    lengths = [ids.size for ids in prompt_ids]
    longest = max(lengths)
    if longest > (capacity or limit):
        what = "the model's context" if capacity is None else "the cache's capacity"
        raise InputError(
            f"prompt {lengths.index(longest)} has {longest} tokens, more than {what} of "
            f"{capacity or limit}; shorten the prompt"
        )
    return capacity or min(longest + max_new_tokens, limit)


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
