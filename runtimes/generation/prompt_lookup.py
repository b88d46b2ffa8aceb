"""Drafts from the text so far: what followed the last few tokens where they stood before.

Summaries, code edits and answers that quote copy long passages, and there these drafts are right.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemma3_export.errors import InputError

__all__ = ["PromptLookup"]


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
