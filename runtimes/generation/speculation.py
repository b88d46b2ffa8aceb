"""Speculative decoding: several drafted tokens are verified in one step of the model.

The sampler chooses at every position as it would without drafts, from the logits of the same
tokens; a draft only decides whether the logits of the next position are there already. So no
distribution changes, and a seed gives the same text with drafts and without, as far as the backend
gives the same logits in a step of several tokens and in a step of one. In float32 they differ in
the last bits, as prefill chunks of different sizes do, so a choice between two candidates that are
equal within that may fall the other way. ONNX Runtime's int8 products differ by far more than
rounding.

Shapes: T verified tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma3_export.errors import InputError
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
ALLOWANCE = 0.02  # what drafts may lose, in plain decoding steps a token
FIRST_TOKENS = 3  # of the longest draft before anything is known
SPARE_TOKENS = 3  # beyond the longest draft, that may be saved up for


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a step that verifies a draft takes longer than a plain one, in plain steps.

    As measured in float32 on a CPU: a step is bound by reading the weights, which more tokens
    share. In int8, where that holds less, a token costs about 0.3.
    """

    draft: float = 0.1  # of leaving the kernels for one token
    token: float = 0.1  # of each drafted token


PLAIN_COSTS = StepCosts()
# A plain step that fetches candidates reads less of the head, and samples from fewer logits.
CANDIDATE_COSTS = StepCosts(draft=0.7, token=0.15)


class Drafter(Protocol):
    """Guesses how one request goes on; it may be wrong at no cost but time."""

    @property
    def token_cost(self) -> float:
        """Time to draft one token, in decoding steps of the model that verifies."""

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """At most ``max_tokens`` tokens that may follow ``tokens``; none is a legal answer.

        Args:
            tokens: prompt and answer so far; each call's begin with those of the call before.
            max_tokens: at least 1.
        """


class DraftBudget:
    """How many tokens to draft, such that wrong drafts never cost more than was allowed.

    An account in decoding steps: accepted tokens pay in the steps that they saved, drafts cost what
    verifying them takes, and every token brings a small allowance. A draft must be covered. So
    where all drafts are wrong, the loss stays under the allowance; where they are right, they soon
    pay for the longest ones.

    Args:
        max_tokens: the longest draft.
        token_cost: what drafting a token costs, besides verifying it.
        costs: of verifying.

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
        """The longest draft that is covered now, 0 for none."""
        covered = int((self._balance - self._draft_cost) / self._token_cost)
        return max(0, min(covered, self._length))

    def record(self, drafted: int, accepted: int) -> None:
        """Settle one step; ``drafted`` 0 is a plain one."""
        self._balance += ALLOWANCE * (1 + accepted)
        if drafted:
            self._balance += accepted - self._cost(drafted)
            longer = 2 * drafted if accepted == drafted else accepted + 1
            self._length = min(longer, self._max_tokens)
        self._balance = min(self._balance, self._most)

    def _cost(self, drafted: int) -> float:
        return self._draft_cost + drafted * self._token_cost


class Speculation:
    """The drafts of one request, and the logits that verifying them has given."""

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
        """[V] after the request's newest token, if it is the one that was drafted next.

        If it is not, whatever was computed after the token before it is of no use.
        """
        token = self._request.tokens[-1].token_id
        if self._verified:
            draft, logits = self._verified.popleft()
            if draft == token:
                self._accepted += 1
                self._request.accepted_tokens += 1
                return logits
        self._verified.clear()
        self._budget.record(self._drafted, self._accepted)
        self._drafted = self._accepted = 0
        return None

    def draft(self) -> list[int]:
        """What may follow the newest token, to be verified together with it."""
        count = min(self._budget.max_draft(), self._request.remaining_tokens - 1)
        if count < 1:
            return []
        answer = self._request.tokens
        new = len(answer) + self._request.prompt_ids.size - len(self._tokens)
        self._tokens.extend(token.token_id for token in answer[len(answer) - new :])
        return self._drafter.draft(self._tokens, count)[:count]

    def keep(self, draft: Sequence[int], logits: Logits) -> None:
        """Take [T, V], the logits that follow each token of ``draft``."""
        self._request.drafted_tokens += len(draft)
        self._drafted = len(draft)
        self._verified.extend(zip(draft, logits, strict=True))


# Drafts from the text so far: what followed the last few tokens where they stood before.
#
# Summaries, code edits and answers that quote copy long passages, and there these drafts are right.


class PromptLookup:
    """A drafter that looks up the last tokens of one request in its own prompt and answer.

    Longer matches go first, and of equally long ones the latest. A token costs a few dictionary
    entries, whatever the length of the text.

    Args:
        max_ngram: most tokens that must have stood there before.
        min_ngram: fewest tokens.

    Raises:
        InputError: the sizes are impossible.
    """

    token_cost = 0.0

    def __init__(self, *, max_ngram: int = 8, min_ngram: int = 3) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise InputError(
                f"min_ngram is {min_ngram} and max_ngram {max_ngram}; they must be at least 1, "
                "and the first no more than the second"
            )
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram to where it last ended
        self._indexed = 0  # n-grams that end here or before are in there

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
        """Remember all n-grams but those at the very end, which must not find themselves."""
        for end in range(self._indexed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)


def _continued(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on; past the end, what has been read so repeats."""
    found = list(tokens[start : start + count])
    period = len(tokens) - start
    while len(found) < count:
        found.append(found[len(found) - period])
    return found


# Drafts from a smaller model: a 270M guesses how a larger Gemma goes on.
#
# Shapes: V vocabulary.

PREFILL_CHUNK = 512


class DraftModel:
    """A drafter that continues one request's text greedily with another runtime.

    Its cache is kept between drafts; tokens that turned out wrong are cut off.

    Args:
        runtime: the smaller model; its tokens must mean what they mean to the larger one.
        capacity: tokens of prompt and answer; once they are exceeded, nothing is drafted.
        token_cost: time of one of its steps, in steps of the model that verifies.
    """

    def __init__(self, runtime: Runtime, *, capacity: int, token_cost: float) -> None:
        self.token_cost = token_cost
        self._runtime = runtime
        self._capacity = min(capacity, runtime.config.max_position_embeddings)
        self._cache: KVCache | None = None
        self._fed: list[int] = []
        self._seen = 0  # of the tokens fed, those that were the request's own and so cannot change

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """See :class:`gemma3_export.runtimes.generation.speculation.Drafter`."""
        count = min(max_tokens, self._capacity - len(tokens) + 1)  # the last is never fed
        if count < 1:
            return []
        found = [self._next_token(tokens)]
        while len(found) < count:
            found.append(self._feed(found[-1:]))
        return found

    def _next_token(self, tokens: Sequence[int]) -> int:
        """What follows ``tokens``, of which only those that are new or changed are computed."""
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
    """Time of a step of ``draft`` in steps of ``model``: as their weights, which a step reads.

    Raises:
        InputError: the vocabularies differ in size.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the draft model has a vocabulary of {draft.config.vocab_size} tokens and the model "
            f"one of {model.config.vocab_size}; both must have the same tokenizer"
        )
    return draft.config.num_parameters / model.config.num_parameters
