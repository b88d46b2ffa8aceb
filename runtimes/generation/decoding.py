"""The loop over a backend: prefill in chunks, decode in a batch, stream, stop, be interrupted.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from gemma3_export.runtimes.generation.candidates import Candidates, ChoosesCandidates
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.request import Completion, RequestState, TokenEvent
from gemma3_export.runtimes.generation.speculation import Speculation
from gemma3_export.runtimes.protocol import IntArray, KVCache, Logits, Runtime

__all__ = ["DecodingLoop", "Event"]

Event = TokenEvent | Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingLoop:
    """One batch on its way through a backend.

    The loop asks of ``_prefill`` and ``_decode`` only the logits that follow each request's newest
    token. Speculation is a ``_decode`` that already has them: tokens are still accepted and
    reported one by one, so events, stops and cancellations come as without it.
    """

    runtime: Runtime
    requests: Sequence[RequestState]
    capacity: int
    prefill_chunk: int
    cancel: Callable[[], bool] | None
    prefill_progress: Callable[[int, int], None] | None
    speculations: Sequence[Speculation | None]  # one a request
    prefix_cache: PrefixCache | None

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
                if request.finish_reason is not None and request.drafted_tokens:
                    self._forget_rejected(request, cache)
                yield from _report(request, event)

    def _prefill(self, request: RequestState, cache: KVCache) -> Logits | None:
        """Feed the prompt to the request's row; [V] after its last token, None if cancelled.

        Chunks end at multiples of their size, wherever a reused prefix ends.
        """
        sizes = [other.prompt_ids.size for other in self.requests]
        row = request.index if len(self.requests) > 1 else None
        fed = self._load_prefix(request, cache)
        while True:
            if self._is_cancelled():
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
                self._store_prefix(request, cache)
                last: Logits = logits[0, -1]
                return last

    def _load_prefix(self, request: RequestState, cache: KVCache) -> int:
        """Take over what is known of the prompt; the number of its tokens."""
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
        """Feed each active request its newest token; [V] for each, or what decides of them.

        Rows that have ended are fed padding along with the others, which costs less than to split
        the batch. When one of them has no room left for that, the active rows go one by one. A row
        that is the only active one may be speculated on.
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
        """[B, 1] each active request's newest token, padding for the others."""
        ids = np.full((len(self.requests), 1), self.runtime.config.pad_token_id, np.int64)
        for request in active:
            ids[request.index] = request.tokens[-1].token_id
        return ids

    def _candidates(
        self, active: Sequence[RequestState], cache: KVCache
    ) -> Sequence[Logits | Candidates] | None:
        """What the backend chose for each request; None where logits are needed."""
        if not isinstance(self.runtime, ChoosesCandidates):
            return None
        params = [request.params for request in active]
        chosen = self.runtime.step_candidates(self._newest(active), cache, params)
        return None if chosen is None else [chosen[request.index] for request in active]

    def _speculate(self, request: RequestState, cache: KVCache) -> Logits | None:
        """[V] after the request's newest token, verified already or with a new draft.

        None where there is nothing to verify.
        """
        speculation = self.speculations[request.index]
        if speculation is None:
            return None
        verified = speculation.verified_logits()
        if verified is not None:
            return verified
        self._forget_rejected(request, cache)
        draft = speculation.draft()
        if not draft:
            return None
        logits = self._step_row(request, cache, draft)
        speculation.keep(draft, logits[1:])
        first: Logits = logits[0]
        return first

    def _step_row(self, request: RequestState, cache: KVCache, draft: Sequence[int]) -> Logits:
        """Feed one request its newest token and a draft; [1 + draft, V]."""
        logits: Logits = self.runtime.step(
            np.array([[request.tokens[-1].token_id, *draft]], np.int64),
            cache,
            num_logits=1 + len(draft),
            row=request.index if len(self.requests) > 1 else None,
        )[0]
        return logits

    def _forget_rejected(self, request: RequestState, cache: KVCache) -> None:
        if cache.lengths[request.index] > request.fed_tokens:
            cache.truncate(request.index, request.fed_tokens)

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
