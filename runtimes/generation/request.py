"""The state and result of one request in the generation loop.

The conventions are vLLM's: a stop token ends a request, is kept among its tokens, and adds no text.
A stop text is cut from the text together with everything after it, while all generated tokens are
kept.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma3_export.runtimes.generation.candidates import Candidates
from gemma3_export.runtimes.generation.sampling import (
    SampledToken,
    Sampler,
    SamplingParams,
    report_logprobs,
)
from gemma3_export.runtimes.protocol import IntArray, Logits

__all__ = [
    "Completion",
    "Failure",
    "FinishReason",
    "RequestState",
    "StopTexts",
    "StreamingDecoder",
    "TokenConstraint",
    "TokenEvent",
]

FinishReason = Literal["stop", "length", "cancelled"]


class StreamingDecoder(Protocol):
    """Turns the tokens of one request into text incrementally."""

    def push(self, token_id: int, /) -> str:
        """Return the text that is now certain; an incomplete character is held back."""

    def flush(self) -> str:
        """Return the text that is still held back; no token follows."""


class TokenConstraint(Protocol):
    """Decides which tokens may follow in one request, such as those that a grammar allows."""

    def begin(self) -> None:
        """Start computing which tokens may come next, beside the step that computes logits."""

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens [V] may come next; wait for them if necessary."""

    def accept(self, token_id: int, /) -> None:
        """Add the chosen token, one of those allowed."""

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""

    @property
    def has_ended(self) -> bool:
        """Whether the text must end here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One more token of a request; the texts of all its events make up the completion's text."""

    request: int  # index of the prompt
    token: SampledToken
    text: str  # what this token released, often empty

    @property
    def token_id(self) -> int:
        """The chosen token."""
        return self.token.token_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The result of a request that has ended, or its partial result."""

    request: int  # index of the prompt
    prompt_tokens: int
    # All that were generated, including a stop token; too long for a notebook's output.
    tokens: tuple[SampledToken, ...] = field(repr=False)
    text: str  # without the stop text; if cancelled, without text that is still held back
    finish_reason: FinishReason
    stop_reason: int | str | None  # the token or text that stopped it
    seed: int | None  # reproduces the completion, with the request's index; None if greedy
    time_to_first_token_s: float | None  # since it was submitted, with all of its batch
    prefill_s: float  # in the backend, for this prompt, including copies of a reused prefix
    decode_s: float  # in backend and sampler, for all tokens after the first
    drafted_tokens: int = 0  # draft tokens that were verified (speculative decoding)
    accepted_tokens: int = 0  # of these, the correct ones: each saved a decode step
    reused_tokens: int = 0  # leading prompt tokens that came from a cache
    # Whether the text satisfies its constraint, which it may not where it was cut off.
    is_complete: bool | None = None  # None: there was no constraint
    # The tokens of the prompt after the first, if SamplingParams.prompt_logprobs is set.
    prompt_logprobs: tuple[SampledToken, ...] = field(default=(), repr=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens."""
        return tuple(token.token_id for token in self.tokens)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens computed per second; None before the first token."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_s if self.tokens and self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first; None with fewer than two."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The end of a request whose sampler or decoder raised an error."""

    request: int  # index of the prompt
    error: Exception


class StopTexts:
    """Cuts a stream of text at the first stop text, and never releases part of one.

    The stop text that is complete first wins, so the result does not depend on how the text is
    split into tokens. ``matched`` is that stop text, None until then.
    """

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self._stop_texts = tuple(stop_texts)
        self._pending = ""  # the longest suffix of the text that could begin a stop text
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add ``text`` and return what can be shown."""
        if self.matched is not None:
            return ""
        text = self._pending + text
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stop_texts if stop in text]
        if ends:
            end, self.matched = min(ends, key=lambda found: (found[0], -len(found[1])))
            self._pending = ""
            return text[: end - len(self.matched)]
        shown = len(text) - self._prefix_length(text)
        self._pending = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text that was held back, as no stop text can follow."""
        pending, self._pending = self._pending, ""
        return pending

    def _prefix_length(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop_texts), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_texts):
                return length
        return 0


class _NoText:
    """A decoder for requests that only want tokens."""

    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


class RequestState:
    """One request's sampler, tokens and text so far, and the reason that it ended.

    The generation loop calls ``accept`` once for every position whose logits it has computed, until
    ``finish_reason`` is set.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: IntArray,
        params: SamplingParams,
        *,
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
        stop_texts: Sequence[str] = (),
        decoder: StreamingDecoder | None = None,
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.tokens: list[SampledToken] = []
        self.prompt_logprobs: list[SampledToken] = []
        self.finish_reason: FinishReason | None = None
        self.time_to_first_token_s: float | None = None
        self.prefill_s = self.decode_s = 0.0
        self.drafted_tokens = self.accepted_tokens = self.reused_tokens = 0
        self._sampler = Sampler(params, prompt_ids)
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stop_texts = StopTexts(stop_texts)
        self._decoder = decoder or _NoText()
        self._constraint = constraint
        if constraint is not None:
            constraint.begin()  # beside the prefill
        self._text = ""
        self._stop_reason: int | str | None = None

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self._sampler.params

    @property
    def needs_all_logits(self) -> bool:
        """Whether a few of the largest logits do not suffice, because others may be allowed."""
        return self._constraint is not None

    @property
    def fed_tokens(self) -> int:
        """Tokens that the backend has seen once it has all but the newest one."""
        return self.prompt_ids.size + len(self.tokens) - 1

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens of the cache that the request can need; its last one is never fed."""
        return self.prompt_ids.size + self._max_new_tokens - 1

    @property
    def remaining_tokens(self) -> int:
        """The most tokens that can still follow."""
        return self._max_new_tokens - len(self.tokens)

    def report_prompt(self, start: int, logits: Logits) -> None:
        """Keep the log-probabilities of prompt tokens, from the logits [T, V] that precede them.

        Args:
            start: position in the prompt of the token that the first logits follow.
            logits: those of a chunk of the prompt.
        """
        count = self.params.prompt_logprobs
        assert count is not None
        following = self.prompt_ids[start + 1 : start + 1 + len(logits)]
        self.prompt_logprobs += [
            report_logprobs(row, int(token_id), count)
            for row, token_id in zip(logits, following, strict=False)  # nothing follows the last
        ]

    def accept(self, logits: Logits | Candidates) -> TokenEvent:
        """Choose the next token from its logits [V], and end the request if it was the last."""
        assert self.finish_reason is None, "the request has ended"
        constraint = self._constraint
        if isinstance(logits, Candidates):
            assert constraint is None, "a constraint needs all logits"
            token = self._sampler.choose(logits.ids, logits.scores)
        else:
            allowed = None if constraint is None else constraint.allowed()
            token = self._sampler.sample(logits, allowed)
        self.tokens.append(token)
        if constraint is not None:
            constraint.accept(token.token_id)
        text = self._read(token.token_id)
        self._text += text
        if constraint is not None and self.finish_reason is None:
            constraint.begin()
        return TokenEvent(request=self.index, token=token, text=text)

    def completion(self) -> Completion:
        """Return the result so far; a request that has not ended counts as cancelled."""
        constraint = self._constraint
        return Completion(
            request=self.index,
            prompt_tokens=self.prompt_ids.size,
            tokens=tuple(self.tokens),
            text=self._text,
            finish_reason=self.finish_reason or "cancelled",
            stop_reason=self._stop_reason,
            seed=None if self.params.is_greedy else self._sampler.seed,
            time_to_first_token_s=self.time_to_first_token_s,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            reused_tokens=self.reused_tokens,
            is_complete=None if constraint is None else constraint.is_complete,
            prompt_logprobs=tuple(self.prompt_logprobs),
        )

    def _read(self, token_id: int) -> str:
        """Return the text that ``token_id`` releases, and set the finish reason."""
        if token_id in self._stop_token_ids:
            self.finish_reason, self._stop_reason = "stop", token_id
            return self._end_text()
        text = self._stop_texts.push(self._decoder.push(token_id))
        if self._constraint is not None and self._constraint.has_ended:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._max_new_tokens:
            self.finish_reason = "length"
            text += self._end_text()
        if self._stop_texts.matched is not None:
            self.finish_reason, self._stop_reason = "stop", self._stop_texts.matched
        return text

    def _end_text(self) -> str:
        held_back = self._decoder.flush()
        if self._constraint is not None and not self._constraint.is_complete:
            held_back = ""  # part of a character; the text stays a prefix of what is allowed
        return self._stop_texts.push(held_back) + self._stop_texts.flush()
