"""Batches of whole examples: short ones share a row, in which none sees another one.

A row is a contiguous part of the token file. A document that does not fit into a row is split into
parts that overlap: each of its tokens is learned once, with at least half a row of text before it
(except at the start). Like windows of text, a batch is a function of the seed and its index alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.errors import InputError
from gemma3_export.reference.training.token_data import (
    BEGINS_DOCUMENT,
    IGNORED_LABEL,
    IS_LEARNED,
    Batch,
)

__all__ = ["PADDING", "ExampleSampler", "pack_examples"]

PADDING = -1  # the document of padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of a split.

    Attributes:
        spans: [R, 3] int64. Row r holds tokens ``spans[r, 0]`` up to ``spans[r, 1]``, and those
            from ``spans[r, 2]`` are learned, if they are marked.
        split_documents: how many documents did not fit into a row.
    """

    spans: NDArray[np.int64]
    split_documents: int


def pack_examples(marks: NDArray[np.uint8], context_length: int) -> Rows:
    """Pack documents in order into rows of at most ``context_length`` inputs.

    Documents in which nothing is learned are left out.

    Args:
        marks: of each token; the first begins a document.
        context_length: inputs per row; one more token is the last label.
    """
    starts = np.flatnonzero(marks & BEGINS_DOCUMENT)
    ends = np.append(starts[1:], marks.size)
    learned = np.concatenate(([0], np.cumsum(marks & IS_LEARNED, dtype=np.int64)))
    capacity = context_length + 1
    spans: list[tuple[int, int, int]] = []
    split_documents = 0
    row_start = row_end = 0  # of the row that is being filled
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if learned[end] == learned[start + 1]:
            continue
        if end - start > capacity:
            split_documents += 1
            spans += _parts_of(start, end, learned, context_length)
            continue
        if row_end > row_start and start == row_end and end - row_start <= capacity:
            row_end = end
            continue
        if row_end > row_start:
            spans.append((row_start, row_end, row_start + 1))
        row_start, row_end = start, end
    if row_end > row_start:
        spans.append((row_start, row_end, row_start + 1))
    return Rows(
        spans=np.array(sorted(spans), np.int64).reshape(-1, 3), split_documents=split_documents
    )


def _parts_of(
    start: int, end: int, learned: NDArray[np.int64], context_length: int
) -> list[tuple[int, int, int]]:
    """Split a long document into parts, leaving out those in which nothing is learned."""
    parts = []
    done = start + 1  # tokens before this one have been learned, or are the first
    stop = start + context_length + 1
    while done < end:
        stop = min(stop, end)
        if learned[stop] > learned[done]:
            parts.append((max(start, stop - context_length - 1), stop, done))
        done = stop
        stop = done + max(1, context_length // 2)
    return parts


class ExampleSampler:
    """Draws rows of examples in a random order, each once per epoch.

    Args:
        tokens: token ids of a split.
        marks: of each token.
        context_length: inputs per row.
        batch_size: rows per batch and process.
        seed: seed of the run.
        stream: random stream; training and validation have one each.

    Raises:
        InputError: nothing in the split is learned.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger[Any]],
        marks: NDArray[np.uint8],
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        stream: int,
    ) -> None:
        self.tokens, self.marks = tokens, marks
        self.context_length, self.batch_size = context_length, batch_size
        self.rows = pack_examples(marks, context_length)
        self._key = seed + (stream << 64)
        if not len(self.rows.spans):
            raise InputError("no token of the examples is to be learned; prepare the data again")
        self._order = lru_cache(maxsize=2)(self._order_of)

    @cached_property
    def learned_tokens(self) -> int:
        """How many tokens an epoch learns."""
        return int(np.count_nonzero(self.marks & IS_LEARNED))

    def num_batches(self, world_size: int) -> int:
        """Return how many batches an epoch has; the last one may be partly of the next epoch."""
        return -(-len(self.rows.spans) // (self.batch_size * world_size))

    def batch(self, index: int, *, rank: int = 0, world_size: int = 1, wraps: bool = True) -> Batch:
        """Return the rank's rows of global batch ``index``.

        Args:
            index: of the batch.
            rank: of the process.
            world_size: number of processes.
            wraps: continue with the next epoch; otherwise rows after the last one are empty.
        """
        import torch  # here, since preparing data needs no torch

        count, shape = len(self.rows.spans), (self.batch_size, self.context_length)
        inputs = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        documents = np.full(shape, PADDING, np.int64)
        first = (index * world_size + rank) * self.batch_size
        for row in range(self.batch_size):
            epoch, place = divmod(first + row, count)
            if epoch and not wraps:
                break
            start, stop, learned_from = self.rows.spans[self._order(epoch)[place]].tolist()
            ids = self.tokens[start:stop].astype(np.int64)
            marks = self.marks[start:stop]
            begins = (marks & BEGINS_DOCUMENT) != 0
            is_label = (marks & IS_LEARNED) != 0
            is_label[: learned_from - start] = False
            is_label &= ~begins  # nothing of its document comes before the first token
            size = stop - start - 1
            inputs[row, :size] = ids[:-1]
            labels[row, :size] = np.where(is_label[1:], ids[1:], IGNORED_LABEL)
            documents[row, :size] = np.cumsum(begins)[:-1]
        return Batch(*map(torch.from_numpy, (inputs, labels, documents)))

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=epoch << 128))
        return generator.permutation(len(self.rows.spans))
