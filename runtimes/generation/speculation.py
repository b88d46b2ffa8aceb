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

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.request import RequestState
from gemma3_export.runtimes.protocol import Logits

__all__ = [
    "CHOSEN_COSTS",
    "MAX_DRAFT_TOKENS",
    "PLAIN_COSTS",
    "DraftBudget",
    "Drafter",
    "Speculation",
    "StepCosts",
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
CHOSEN_COSTS = StepCosts(draft=0.7, token=0.15)


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
