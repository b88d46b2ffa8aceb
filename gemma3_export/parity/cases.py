"""The cases: ways of feeding the same tokens that must all give the same numbers.

Every case yields what it saw (:mod:`gemma3_export.parity.sequences`); judging is done elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.sequences import (
    CacheRead,
    Observation,
    Seen,
    TeacherForcing,
    TokenSequence,
    decode_start,
    least_tokens,
)
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVCache,
    LayerKV,
    Logits,
    PaddedBatches,
    PaddingSide,
    Runtime,
    RuntimeInfo,
)

__all__ = [
    "Case",
    "PlanningRuntime",
    "cases_for",
    "chunk_size",
    "needed_positions",
    "padded_batch",
]

LONG = 0  # index of the long random sequence
SHORT = (1, 2)
KEPT = 8  # logits kept of a long prefill
CROSSING = 24  # logits kept of the chunk that crosses the window's edge
KEEP_ALL_BYTES = 32 * 2**20  # a step keeps all its logits when they are no more than this
BATCH_STEPS = 8

Sequences = Sequence[TokenSequence]


@dataclass(frozen=True, slots=True)
class Case:
    """One way of feeding tokens."""

    name: str
    title: str  # for people
    run: Callable[[Runtime], Iterator[Seen]]
    is_text: bool = False
    checks_variants: bool = False  # repeated on other variants of the graph
    checks_candidates: bool = False  # repeated with candidates in place of all logits
    padded_sequences: tuple[int, ...] = ()  # fed as one padded batch, all positions compared


def cases_for(
    runtime: Runtime, config: Gemma3Config, sequences: Sequences, options: VerifyOptions
) -> list[Case]:
    """All cases that this runtime and model allow; ``config`` is the reference's."""
    window, long = config.sliding_window, len(sequences[LONG].ids)
    lengths = sorted(
        {min(n, long) for n in (window - 1, window, window + 1, 2 * window + 3) if n > 0}
    )
    cases = [
        Case(f"prefill-{n}", f"{n} tokens at once", partial(prefill, sequences=sequences, length=n))
        for n in lengths
    ]
    chunk = chunk_size(config, lengths[-1])
    start = decode_start(config, options)
    steps = min(options.decode_steps, long - start)
    cases += [
        Case(
            "chunked",
            f"{lengths[-1]} tokens in chunks of {chunk}, the last few one by one",
            partial(chunked, sequences=sequences, length=lengths[-1], chunk=chunk, window=window),
            checks_variants=True,
        ),
        Case(
            "decode",
            f"{steps} cached steps after {start} tokens, across the window",
            partial(decode, sequences=sequences, start=start, steps=steps),
            checks_variants=True,
            checks_candidates=True,
        ),
        Case(
            "ragged-batch",
            "three rows of different length, decoded together",
            partial(ragged_batch, sequences=sequences, window=window),
            checks_variants=True,
            checks_candidates=True,
        ),
        Case(
            "batch",
            "two rows of equal length, prefilled and decoded together",
            partial(equal_batch, sequences=sequences),
        ),
        Case(
            "kept-logits",
            "the same prompt with all, one and three logits kept",
            partial(kept_logits, sequences=sequences),
        ),
    ]
    if isinstance(runtime, PaddedBatches) and runtime.padding_side is not None:
        cases.append(
            Case(
                "padded",
                "two rows in one padded batch",
                partial(padded, sequences=sequences),
                checks_variants=True,
                padded_sequences=SHORT,
            )
        )
    for index, sequence in enumerate(sequences):
        if sequence.is_text:
            run = partial(text, sequences=sequences, index=index)
            cases.append(Case(f"text-{index}", sequence.name, run, is_text=True))
    return cases


def chunk_size(config: Gemma3Config, length: int) -> int:
    """Tokens a chunk: at most a fifth of the window, dividing neither it nor ``length``."""
    window = config.sliding_window
    chunk = max(2, min(window, length) // 5)
    while chunk < length and (length % chunk == 0 or window % chunk == 0):
        chunk += 1
    return chunk


def keep_of(runtime: Runtime, count: int, least: int = KEPT) -> int:
    """Logits to keep of a step of ``count`` tokens; 0, all of them, when they are small."""
    if count * runtime.config.vocab_size * 4 <= KEEP_ALL_BYTES:
        return 0
    return min(least, count)


def prefill(runtime: Runtime, *, sequences: Sequences, length: int) -> Iterator[Seen]:
    """The whole prefix in one step."""
    walk = TeacherForcing(runtime, sequences, [LONG])
    yield from walk.step(length, keep=keep_of(runtime, length))
    yield from walk.read()


def chunked(
    runtime: Runtime, *, sequences: Sequences, length: int, chunk: int, window: int
) -> Iterator[Seen]:
    """Chunks of several tokens, which cross the window's edge, then single tokens."""
    walk = TeacherForcing(runtime, sequences, [LONG])
    singles = min(KEPT, length - 1)
    while left := length - singles - walk.fed[0]:
        count = min(chunk, left)
        crosses = walk.fed[0] < window <= walk.fed[0] + count
        yield from walk.step(count, keep=keep_of(runtime, count, CROSSING if crosses else KEPT))
    for _ in range(singles):
        yield from walk.step(1)
    yield from walk.read()


def decode(runtime: Runtime, *, sequences: Sequences, start: int, steps: int) -> Iterator[Seen]:
    """Single tokens after a prefix."""
    walk = TeacherForcing(runtime, sequences, [LONG])
    yield from walk.step(start, keep=1)
    for _ in range(steps):
        yield from walk.step(1)
    yield from walk.read()


def ragged_batch(runtime: Runtime, *, sequences: Sequences, window: int) -> Iterator[Seen]:
    """Rows prefilled one by one, the long one up to just before its window; then joint steps."""
    rows = [SHORT[0], LONG, SHORT[1]]
    walk = TeacherForcing(runtime, sequences, rows)
    shortest = min(len(sequences[row].ids) for row in rows)
    steps = min(BATCH_STEPS, shortest - 1)
    for index, row in enumerate(rows):
        length = len(sequences[row].ids) - steps
        if row == LONG:
            length = max(1, min(length, window - steps // 2))
        yield from walk.step(length, keep=1, row=index)
    for _ in range(steps):
        yield from walk.step(1)
    yield from walk.read()


def equal_batch(runtime: Runtime, *, sequences: Sequences) -> Iterator[Seen]:
    """Two rows of equal length in common steps of several tokens and of one."""
    walk = TeacherForcing(runtime, sequences, SHORT)
    length = min(len(sequences[row].ids) for row in SHORT)
    yield from walk.step(max(1, length // 2), keep=1)
    if walk.fed[0] + 2 < length:
        yield from walk.step(2)
    while walk.fed[0] < length:
        yield from walk.step(1)
    yield from walk.read()


def kept_logits(runtime: Runtime, *, sequences: Sequences) -> Iterator[Seen]:
    """num_logits of 0 (all), 1 and 3 over the same prompt."""
    for keep in (0, 1, 3):
        walk = TeacherForcing(runtime, sequences, [SHORT[1]])
        length = len(sequences[SHORT[1]].ids)
        yield from walk.step(length, keep=min(keep, length))


def padded(runtime: Runtime, *, sequences: Sequences) -> Iterator[Seen]:
    """Two sequences of different length in one padded batch."""
    yield from padded_batch(runtime, sequences, SHORT)


def text(runtime: Runtime, *, sequences: Sequences, index: int) -> Iterator[Seen]:
    """A text prompt at once, with all its logits."""
    walk = TeacherForcing(runtime, sequences, [index])
    yield from walk.step(len(sequences[index].ids))
    yield from walk.read()


# Padded batches, which our own loop never makes.
#
# Consumers other than our own runtime pad: on the left where positions come from the mask, on the
# right where GroupQueryAttention takes lengths from the mask's sums.
#
# Shapes: B rows, T padded length, V vocabulary, K key-value heads, H head size.


def padded_batch(
    runtime: Runtime, sequences: Sequence[TokenSequence], rows: Sequence[int]
) -> list[Seen]:
    """Prefill whole sequences of different length in one padded batch with an empty past."""
    assert isinstance(runtime, PaddedBatches)
    side = runtime.padding_side
    assert side is not None
    ids, mask = pad([sequences[row].ids for row in rows], runtime.config.pad_token_id, side)
    logits, present = runtime.run_padded(ids, mask)
    seen: list[Seen] = []
    for index, row in enumerate(rows):
        keep = np.flatnonzero(mask[index])
        layers = [
            (key[index][:, keep], value[index][:, keep])
            for key, value in zip(present[::2], present[1::2], strict=True)
        ]
        positions = np.arange(len(keep))
        seen.append(Observation(row, positions, logits[index][keep], step=0, first_new=0))
        least = least_tokens(runtime.config, len(keep))
        seen.append(CacheRead(row, len(keep), layers, least))
    return seen


def pad(rows: Sequence[IntArray], token_id: int, side: PaddingSide) -> tuple[IntArray, IntArray]:
    """Ids and mask [B, T]."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), token_id, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, part], mask[index, part] = row, 1
    return ids, mask


# A dry run of the cases: which logits they will look at, and how many steps they take.


class PlanningCache:
    """Counts tokens and holds none."""

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.lengths: IntArray = np.zeros(batch_size, np.int64)

    def read(self, row: int) -> list[LayerKV]:
        """Nothing."""
        del row
        return []

    def truncate(self, row: int, length: int) -> None:
        """Nothing."""
        del row, length


class PlanningRuntime:
    """A :class:`gemma3_export.runtimes.protocol.Runtime` that computes nothing."""

    info = RuntimeInfo(
        name="dry-run", dtype="float32", compute_dtype="float32", device=Device("cpu")
    )

    def __init__(self, config: Gemma3Config) -> None:
        self.config = config

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache that holds nothing."""
        return PlanningCache(batch_size, capacity)

    def step(
        self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int | None = None
    ) -> Logits:
        """Logits of an empty vocabulary."""
        del cache, row
        rows, new = input_ids.shape
        return np.zeros((rows, num_logits or new, 0), np.float32)


def needed_positions(
    config: Gemma3Config, cases: Sequence[Case], sequences: Sequence[TokenSequence]
) -> dict[int, set[int]]:
    """The positions of each sequence whose logits some case compares."""
    runtime = PlanningRuntime(config)
    needed: dict[int, set[int]] = {}
    for case in cases:
        if case.padded_sequences:
            needed |= {
                index: set(range(len(sequences[index].ids))) for index in case.padded_sequences
            }
            continue
        for seen in case.run(runtime):
            if isinstance(seen, Observation):
                needed.setdefault(seen.sequence, set()).update(seen.positions.tolist())
    return needed
