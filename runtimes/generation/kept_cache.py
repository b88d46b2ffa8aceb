"""Keep the cache of a conversation between turns, so that each turn computes only new tokens.

Shapes: B rows, L cached tokens.
"""

from __future__ import annotations

import numpy as np

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.request import RequestState
from gemma3_export.runtimes.protocol import IntArray, KVCache, Runtime

__all__ = ["KeptCache"]


class KeptCache:
    """The cache of one row, kept after a generation so that the next generation continues it.

    The next prompt may differ from the cached tokens: their common prefix is kept, and the rest of
    the cache is truncated. After an error, or if a sliding-window cache has evicted tokens that the
    truncation needs, the next prompt starts with an empty cache.

    Args:
        runtime: the backend that the cache belongs to.
        capacity: minimum capacity in tokens, so that a conversation can grow.
    """

    def __init__(self, runtime: Runtime, *, capacity: int = 0) -> None:
        self._runtime = runtime
        self._capacity = min(capacity, runtime.config.max_position_embeddings)
        self._cache: KVCache | None = None
        self._token_ids: IntArray = np.zeros(0, np.int64)

    def belongs_to(self, runtime: Runtime) -> bool:
        """Return True if the cache belongs to ``runtime``."""
        return runtime is self._runtime

    def take(self, runtime: Runtime, prompt_ids: IntArray, capacity: int) -> KVCache:
        """Return a cache with a proper prefix of ``prompt_ids`` and room for ``capacity`` tokens.

        The caller owns the cache until :meth:`give_back`. If an error prevents that, the cache is
        dropped, so a cache in an unknown state is never reused.

        Raises:
            InputError: the cache belongs to another runtime.
        """
        if not self.belongs_to(runtime):
            raise InputError("the kept cache belongs to another runtime; keep one per runtime")
        cache, self._cache = self._cache, None
        if cache is not None and cache.capacity >= capacity:
            longest = min(
                prompt_ids.size - 1, self._token_ids.size
            )  # logits need at least one new token
            same = prompt_ids[:longest] == self._token_ids[:longest]
            common = longest if same.all() else int(same.argmin())
            try:
                if common < cache.lengths[0]:
                    cache.truncate(0, common)
            except InputError:  # a sliding-window cache has evicted what is needed
                pass
            else:
                return cache
        if cache is not None and cache.capacity < capacity:  # grow by doubling
            limit = runtime.config.max_position_embeddings
            self._capacity = min(2 * capacity, limit)
        return runtime.new_cache(1, max(capacity, self._capacity))

    def give_back(self, cache: KVCache, request: RequestState) -> None:
        """Keep ``cache``, and record which tokens of ``request`` it holds.

        It may also hold rejected drafts after them, which the next prompt truncates.
        """
        tokens = np.array([token.token_id for token in request.tokens], np.int64)
        held = min(int(cache.lengths[0]), request.fed_tokens)
        self._token_ids = np.concatenate((request.prompt_ids, tokens))[:held]
        self._cache = cache
