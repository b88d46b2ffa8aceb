"""Speculative decoding: drafted tokens are verified several at a time in one step of the model.

The sampler chooses at every position as it would without drafts, from the logits of the same
tokens; a draft only decides whether the next position's logits are available already. So no
distribution changes, and a seed gives the same text with and without drafts, provided the backend
computes the same logits in steps of several tokens and of one. In float32 they differ in the last
bits, as between prefill chunks of different sizes, so near-ties may be decided differently. With
ONNX Runtime's int8 products they differ by far more than rounding.

Shapes: T verified tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma3_export.errors import InputError
from gemma3_export.limits import PREFILL_CHUNK
from gemma3_export.runtimes.generation.request import RequestState
from gemma3_export.runtimes.protocol import KVCache, Logits, Runtime

__all__ = [
    "CANDIDATE_COSTS",
    "MAX_DRAFT_TOKENS",
    "PLAIN_COSTS",
    "DraftBudget",
    "DraftModel",
    "Drafter",
    "PromptLookup",
    "Speculation",
    "StepCosts",
    "relative_cost",
]

MAX_DRAFT_TOKENS = 16
ALLOWANCE = 0.02  # time that drafts may lose, in plain decode steps per token
FIRST_TOKENS = 3  # length of the longest first draft
SPARE_TOKENS = 3  # drafted tokens that can be saved up for, beyond the longest draft


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Extra time of a step that verifies a draft, in plain decode steps.

    The defaults were measured in float32 on a CPU, where a step is bound by reading the weights,
    which its tokens share. In int8 a token costs about 0.3.
    """

    draft: float = 0.1  # per draft: the kernels for a single token no longer apply
    token: float = 0.1  # per drafted token


PLAIN_COSTS = StepCosts()
# Plain steps that fetch candidates are faster: they read less of the head and sample from less.
CANDIDATE_COSTS = StepCosts(draft=0.7, token=0.15)


class Drafter(Protocol):
    """Guesses the next tokens of one request; wrong guesses only cost time."""

    @property
    def token_cost(self) -> float:
        """Time to draft one token, in decode steps of the model that verifies."""

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Return up to ``max_tokens`` tokens that may follow ``tokens``, possibly none.

        Args:
            tokens: prompt and answer so far; every call extends the tokens of the previous one.
            max_tokens: at least 1.
        """


class DraftBudget:
    """Decides how many tokens to draft, so that wrong drafts never cost more than an allowance.

    It keeps a balance in decode steps: accepted tokens add the steps that they saved, drafts
    subtract the time to verify them, and every token adds a small allowance. The balance must cover
    a draft. So if all drafts are wrong, the loss stays below the allowance; if they are right, the
    longest drafts are soon affordable.

    Args:
        max_tokens: length of the longest draft.
        token_cost: time to draft a token, in addition to verifying it.
        costs: time to verify.

    Raises:
        InputError: ``max_tokens`` is not positive.
    """

    def __init__(
        self,
        max_tokens: int = MAX_DRAFT_TOKENS,
        token_cost: float = 0.0,
        costs: StepCosts = PLAIN_COSTS,
    ) -> None:
        if max_tokens < 1:
            raise InputError(f"max_draft_tokens is {max_tokens}; it must be at least 1")
        self._max_tokens = max_tokens
        self._draft_cost = costs.draft
        self._token_cost = costs.token + token_cost
        self._balance = self._cost(FIRST_TOKENS)
        self._most = self._cost(max_tokens + SPARE_TOKENS)
        self._length = max_tokens  # grows while drafts are right

    def max_draft(self) -> int:
        """Return the length of the longest draft that the balance covers, 0 for none."""
        covered = int((self._balance - self._draft_cost) / self._token_cost)
        return max(0, min(covered, self._length))

    def record(self, drafted: int, accepted: int) -> None:
        """Update the balance after one step; ``drafted`` is 0 for a plain one."""
        self._balance += ALLOWANCE * (1 + accepted)
        if drafted:
            self._balance += accepted - self._cost(drafted)
            longer = 2 * drafted if accepted == drafted else accepted + 1
            self._length = min(longer, self._max_tokens)
        self._balance = min(self._balance, self._most)

    def _cost(self, drafted: int) -> float:
        return self._draft_cost + drafted * self._token_cost


class Speculation:
    """The drafts of one request, and the logits computed by verifying them."""

    def __init__(
        self, request: RequestState, drafter: Drafter, max_tokens: int, costs: StepCosts
    ) -> None:
        self._request = request
        self._drafter = drafter
        self._budget = DraftBudget(max_tokens, drafter.token_cost, costs)
        self._tokens: list[int] = request.prompt_ids.tolist()
        self._verified: deque[tuple[int, Logits]] = deque()  # drafted token, [V] that follow it
        self._drafted = self._accepted = 0  # of the last step

    def verified_logits(self) -> Logits | None:
        """Return the logits [V] after the request's newest token, if it is the next drafted one.

        If it is not, the rest of the draft is discarded.
        """
        token = self._request.tokens[-1].token_id
        if self._verified:
            draft, logits = self._verified.popleft()
            if draft == token:
                self._accepted += 1
                self._request.accepted_tokens += 1
                return logits
        self.discard()
        self._budget.record(self._drafted, self._accepted)
        self._drafted = self._accepted = 0
        return None

    def discard(self) -> None:
        """Give up the rest of the draft, as when other requests join the request's steps."""
        self._verified.clear()

    def draft(self) -> list[int]:
        """Return the draft to verify together with the newest token."""
        count = min(self._budget.max_draft(), self._request.remaining_tokens - 1)
        if count < 1:
            return []
        answer = self._request.tokens
        new = len(answer) + self._request.prompt_ids.size - len(self._tokens)
        self._tokens.extend(token.token_id for token in answer[len(answer) - new :])
        return self._drafter.draft(self._tokens, count)[:count]

    def keep(self, draft: Sequence[int], logits: Logits) -> None:
        """Store ``logits`` [T, V], which follow each token of ``draft``."""
        self._request.drafted_tokens += len(draft)
        self._drafted = len(draft)
        self._verified.extend(zip(draft, logits, strict=True))


class PromptLookup:
    """A drafter that copies what followed an earlier occurrence of the request's last tokens.

    It works well for summaries, code edits and answers that quote, which copy long passages. The
    longest match wins, and among equally long ones the latest. A token costs a few dictionary
    entries, whatever the length of the text.

    Args:
        max_ngram: the most tokens to match.
        min_ngram: the fewest tokens to match.

    Raises:
        InputError: the sizes are out of range.
    """

    token_cost = 0.0

    def __init__(self, *, max_ngram: int = 8, min_ngram: int = 3) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise InputError(
                f"min_ngram is {min_ngram} and max_ngram {max_ngram}; they must be at least 1, "
                "and the first no more than the second"
            )
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where it last ended
        self._indexed = 0  # n-grams that end here or earlier are indexed

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """See :class:`gemma3_export.runtimes.generation.speculation.Drafter`."""
        self._index(tokens)
        for size in self._sizes:
            if len(tokens) <= size:
                continue
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None:
                return _continued(tokens, end, max_tokens)
        return []

    def _index(self, tokens: Sequence[int]) -> None:
        """Index all n-grams but those at the very end, which must not match themselves."""
        for end in range(self._indexed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)


def _continued(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """Return ``count`` tokens from ``start`` on, repeating them past the end."""
    found = list(tokens[start : start + count])
    period = len(tokens) - start
    while len(found) < count:
        found.append(found[len(found) - period])
    return found


class DraftModel:
    """A drafter that continues one request's text greedily with a smaller model.

    Its cache is kept between drafts; rejected tokens are cut off.

    Args:
        runtime: the smaller model, with the tokenizer of the larger one.
        capacity: tokens of prompt and answer; beyond it, nothing is drafted.
        token_cost: time of one of its steps, in steps of the model that verifies.
    """

    def __init__(self, runtime: Runtime, *, capacity: int, token_cost: float) -> None:
        self.token_cost = token_cost
        self._runtime = runtime
        self._capacity = min(capacity, runtime.config.max_position_embeddings)
        self._cache: KVCache | None = None
        self._fed: list[int] = []
        self._seen = 0  # tokens fed that were the request's own, which cannot change

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """See :class:`gemma3_export.runtimes.generation.speculation.Drafter`."""
        count = min(max_tokens, self._capacity - len(tokens) + 1)  # the last one is never fed
        if count < 1:
            return []
        found = [self._next_token(tokens)]
        while len(found) < count:
            found.append(self._feed(found[-1:]))
        return found

    def _next_token(self, tokens: Sequence[int]) -> int:
        """Return the token that follows ``tokens``; only new or changed ones are computed."""
        if self._cache is None:
            self._cache = self._runtime.new_cache(1, self._capacity)
        same, end = self._seen, min(len(self._fed), len(tokens) - 1)
        while same < end and self._fed[same] == tokens[same]:
            same += 1
        self._cache.truncate(0, same)
        del self._fed[same:]
        self._seen = len(tokens)
        for start in range(same, len(tokens), PREFILL_CHUNK):
            following = self._feed(tokens[start : start + PREFILL_CHUNK])
        return following

    def _feed(self, tokens: Sequence[int]) -> int:
        assert self._cache is not None
        logits = self._runtime.step(np.array([tokens], np.int64), self._cache, num_logits=1)
        self._fed.extend(tokens)
        return int(logits[0, -1].argmax())


def relative_cost(draft: Runtime, model: Runtime) -> float:
    """Return the time of a step of ``draft`` in steps of ``model``, estimated from their weights.

    Raises:
        InputError: the vocabularies differ in size.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the draft model has a vocabulary of {draft.config.vocab_size} tokens and the model "
            f"one of {model.config.vocab_size}; use a draft model with the same tokenizer"
        )
    return draft.config.num_parameters / model.config.num_parameters
