"""A cache that outlives a generation: the turns of a conversation are computed once.

Shapes: B rows, L cached tokens.
"""

from __future__ import annotations

import numpy as np

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.request import RequestState
from gemma3_export.runtimes.protocol import IntArray, KVCache, Runtime

__all__ = ["KeptCache"]


class KeptCache:
    """One row's cache that outlives a generation, so that the next one continues it.

    The next prompt may differ from what the cache holds: the tokens that both begin with are kept,
    the others are cut off. Where a sliding-window cache has evicted what the cut would need, and
    after an error, the next prompt starts with an empty cache.

    Args:
        runtime: the backend that the cache belongs to.
        capacity: the fewest tokens to allocate room for, so that a conversation can grow.
    """

    def __init__(self, runtime: Runtime, *, capacity: int = 0) -> None:
        self._runtime = runtime
        self._capacity = min(capacity, runtime.config.max_position_embeddings)
        self._cache: KVCache | None = None
        self._token_ids: IntArray = np.zeros(0, np.int64)

    def belongs_to(self, runtime: Runtime) -> bool:
        """Return whether the cache is one of ``runtime``."""
        return runtime is self._runtime

    def take(self, runtime: Runtime, prompt_ids: IntArray, capacity: int) -> KVCache:
        """Return a cache that holds a true prefix of ``prompt_ids`` and has room for ``capacity``.

        It stays out until it is given back: an error in between loses it, not its consistency.

        Raises:
            InputError: it belongs to another runtime.
        """
        if not self.belongs_to(runtime):
            raise InputError("the kept cache belongs to another runtime; keep one per runtime")
        cache, self._cache = self._cache, None
        if cache is not None and cache.capacity >= capacity:
            longest = min(prompt_ids.size - 1, self._token_ids.size)  # one token gives the logits
            same = prompt_ids[:longest] == self._token_ids[:longest]
            common = longest if same.all() else int(same.argmin())
            try:
                if common < cache.lengths[0]:
                    cache.truncate(0, common)
            except InputError:  # a sliding-window cache no longer has what the cut needs
                pass
            else:
                return cache
        if cache is not None and cache.capacity < capacity:  # grow by doubling
            limit = runtime.config.max_position_embeddings
            self._capacity = min(2 * capacity, limit)
        return runtime.new_cache(1, max(capacity, self._capacity))

    def give_back(self, cache: KVCache, request: RequestState) -> None:
        """Keep ``cache`` with the tokens of ``request`` that it is known to hold.

        Beyond those it may hold drafts that were rejected; the next prompt cuts them off.
        """
        tokens = np.array([token.token_id for token in request.tokens], np.int64)
        held = min(int(cache.lengths[0]), request.fed_tokens)
        self._token_ids = np.concatenate((request.prompt_ids, tokens))[:held]
        self._cache = cache
