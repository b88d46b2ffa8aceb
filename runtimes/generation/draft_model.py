"""Drafts from a smaller model: a 270M guesses how a larger Gemma goes on.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma3_export.errors import InputError
from gemma3_export.runtimes.protocol import KVCache, Runtime

__all__ = ["DraftModel", "relative_cost"]

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
