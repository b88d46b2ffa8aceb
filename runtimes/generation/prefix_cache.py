"""A prefix cache: keys and values of earlier prompts, so that shared prefixes are computed once.

Stored tokens form a tree: each segment continues another one from some token on, so tokens that
prompts share are stored once.

A token's keys and values depend, in their last bits, on the chunk in which they were computed.
Reuse that ends on a boundary of prefill chunks leaves the same chunks to compute, so results are
bitwise those without reuse if all chunks have the same size. If it depends on other requests, as by
default in an engine, or reuse ends elsewhere, they agree up to rounding, which int8 products
amplify: the difference is that between two chunk sizes.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gemma3_export.errors import InputError
from gemma3_export.runtimes.protocol import (
    CacheVariants,
    IntArray,
    KVCache,
    KVSegment,
    Runtime,
    TransferableCache,
)

__all__ = ["ChunkSizes", "PrefixCache", "require_transferable"]

# Prompt tokens of a step beside other answers, and while there are none.
ChunkSizes = tuple[int, int]


@dataclass(eq=False, slots=True)
class Segment:
    """Consecutive tokens that some prompts share, from position ``start`` on."""

    start: int
    token_ids: IntArray
    stored: KVSegment
    parent: Segment | None  # holds the previous token; None at the start of a prompt
    siblings: list[Segment]  # the list that contains it
    last_use: int = 0
    children: list[Segment] = field(default_factory=list)

    def path(self, stop: int) -> list[Segment]:
        """Return the segments that hold the tokens before ``stop``, in order."""
        found: list[Segment] = []
        segment: Segment | None = self
        while segment is not None:
            if segment.start < stop:
                found.append(segment)
            segment = segment.parent
        return found[::-1]


class PrefixCache:
    """Prompt prefixes of one runtime, bounded in bytes; safe to share between threads.

    When it is full, the least recently used segment that no other continues is evicted first. Of a
    prompt that exceeds the whole cache, the beginning is kept.

    Args:
        runtime: the runtime whose keys and values are stored; no other may use them.
        max_bytes: the most memory for keys and values, on the device of the runtime's caches.
        granularity: reuse ends at a multiple of this many tokens. The default is the smaller
            prefill chunk of the request: results are bitwise unchanged if it has only one size.
            1 reuses every common token, and results agree up to rounding.

    Raises:
        InputError: a number is not positive, or the runtime's caches do not keep every token.
    """

    def __init__(self, runtime: Runtime, *, max_bytes: int, granularity: int | None = None) -> None:
        for name, value in (("max_bytes", max_bytes), ("granularity", granularity)):
            if value is not None and value < 1:
                raise InputError(f"{name} of a prefix cache is {value}; it must be at least 1")
        if isinstance(runtime, CacheVariants) and runtime.uses_sliding_window_cache:
            raise InputError(
                "a prefix cache needs caches that keep every token; open the runtime with "
                "sliding_window_cache=False"
            )
        self.runtime = runtime
        self.max_bytes = max_bytes
        self._granularity = granularity
        self._roots: dict[ChunkSizes, list[Segment]] = {}
        self._used_bytes = self._clock = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Size of the stored keys and values; never more than ``max_bytes``."""
        return self._used_bytes

    def require_runtime(self, runtime: Runtime) -> None:
        """Check that ``runtime`` is the one that computed what is stored.

        Raises:
            InputError: it is another one.
        """
        if runtime is not self.runtime:
            raise InputError(
                f"the prefix cache was made for another runtime ({self.runtime.info.name}) than "
                f"the one that generates ({runtime.info.name}); make a PrefixCache for each "
                "loaded model"
            )

    def clear(self) -> None:
        """Drop everything, which is necessary if the model's weights have changed."""
        with self._lock:
            self._roots.clear()
            self._used_bytes = 0

    def load(self, cache: KVCache, row: int, token_ids: IntArray, chunks: ChunkSizes) -> int:
        """Fill an empty row with the longest stored prefix, and return its length.

        The prompt's last token is never loaded, because its logits are needed.

        Args:
            cache: the cache to fill.
            row: an empty row of it.
            token_ids: [T] the prompt.
            chunks: the sizes of the chunks in which the rest will be computed.

        Raises:
            InputError: tokens cannot be copied to the cache, or it has no room.
        """
        cache = require_transferable(cache)
        step = self._granularity or chunks[0]
        with self._lock:
            segment, same = self._find(token_ids[:-1], chunks)
            count = same // step * step
            path = segment.path(count) if segment is not None else []
            self._touch(path)
        for following, segment in enumerate(path, 1):
            stop = path[following].start if following < len(path) else count
            cache.load_tokens(row, segment.stored, stop - segment.start)
        return count

    def store(self, cache: KVCache, row: int, token_ids: IntArray, chunks: ChunkSizes) -> None:
        """Store the tokens of a prompt that are new, as far as there is room.

        Args:
            cache: a cache that holds the prompt.
            row: the prompt's row.
            token_ids: [T] the prompt.
            chunks: the sizes of the chunks in which it was computed.

        Raises:
            InputError: tokens cannot be copied from the cache.
        """
        cache = require_transferable(cache)
        step = self._granularity or chunks[0]
        with self._lock:
            segment, same = self._find(token_ids, chunks)
            start, wanted = same // step * step, token_ids.size // step * step
            path = segment.path(start) if segment is not None else []
            self._touch(path)
            parent = path[-1] if path else None
            self._make_room((wanted - start) * cache.kv_bytes_per_token, parent)
            room = (self.max_bytes - self._used_bytes) // cache.kv_bytes_per_token
            stop = start + min(wanted - start, room) // step * step
            if stop <= start:
                return
            roots = self._roots.setdefault(chunks, [])
            added = Segment(
                start=start,
                token_ids=token_ids[start:stop].copy(),
                stored=cache.export_tokens(row, start, stop),
                parent=parent,
                siblings=roots if parent is None else parent.children,
            )
            added.siblings.append(added)
            self._used_bytes += added.stored.size_bytes
            self._touch([added])

    def _find(self, token_ids: IntArray, chunks: ChunkSizes) -> tuple[Segment | None, int]:
        """Return the segment where the longest stored prefix ends, and the prefix's length."""
        best, longest = None, 0
        ahead = list(self._roots.get(chunks, ()))
        while ahead:
            segment = ahead.pop()
            end = segment.start + common_length(segment.token_ids, token_ids[segment.start :])
            if end > longest:
                best, longest = segment, end
            ahead += [child for child in segment.children if child.start <= end]
        return best, longest

    def _touch(self, path: list[Segment]) -> None:
        self._clock += 1
        for segment in path:
            segment.last_use = self._clock

    def _make_room(self, size_bytes: int, kept: Segment | None) -> None:
        """Evict the least recently used segments, but not ``kept``, until there is room."""
        if self._used_bytes + size_bytes <= self.max_bytes:
            return
        ends = [
            (s.last_use, id(s), s) for s in self._segments() if not s.children and s is not kept
        ]
        heapq.heapify(ends)
        while ends and self._used_bytes + size_bytes > self.max_bytes:
            _, _, dropped = heapq.heappop(ends)
            dropped.siblings.remove(dropped)
            self._used_bytes -= dropped.stored.size_bytes
            parent = dropped.parent
            if parent is not None and not parent.children and parent is not kept:
                heapq.heappush(ends, (parent.last_use, id(parent), parent))

    def _segments(self) -> Iterator[Segment]:
        ahead = [segment for roots in self._roots.values() for segment in roots]
        while ahead:
            segment = ahead.pop()
            ahead += segment.children
            yield segment


def common_length(a: IntArray, b: IntArray) -> int:
    """Return the length of the common prefix."""
    size = min(a.size, b.size)
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if different.size else size


def require_transferable(cache: KVCache) -> TransferableCache:
    """Return ``cache`` if tokens can be copied from and to it.

    Raises:
        InputError: they cannot.
    """
    if not isinstance(cache, TransferableCache):
        raise InputError(
            "this runtime's caches cannot share prompt prefixes; generate without a prefix cache"
        )
    return cache
