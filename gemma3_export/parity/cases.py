"""Define the cases: ways to feed the same tokens that must all give the same numbers.

A case yields observations (see :mod:`gemma3_export.parity.sequences`), which
:mod:`gemma3_export.parity.judge` compares.

Shapes: B rows, T tokens, V vocabulary.
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
    CacheObservation,
    LogitObservation,
    Observation,
    TeacherForcing,
    TokenSequence,
    decode_start,
    required_tokens,
)
from gemma3_export.runtimes.protocol import (
    NO_LOGITS,
    IntArray,
    KVCache,
    LayerKV,
    Logits,
    PaddedBatches,
    PaddingSide,
    Runtime,
    RuntimeInfo,
    count_logits,
)

__all__ = [
    "Case",
    "cases_for",
    "needed_positions",
    "work_of",
]

LONG = 0  # index of the long random sequence
SHORT = (1, 2)
KEPT = 8  # logits kept from a long prefill
KEPT_AT_EDGE = 24  # logits kept from the chunk that crosses the window's edge
KEEP_ALL_BYTES = 32 * 2**20  # a step keeps all its logits if they fit into this
BATCH_STEPS = 8
STEP_WORK = 32  # a step reads all weights, which takes about as long as prefilling 32 tokens

Sequences = Sequence[TokenSequence]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to feed tokens."""

    name: str
    title: str  # for reports
    run: Callable[[Runtime], Iterator[Observation]]
    is_text: bool = False
    checks_variants: bool = False  # repeat it on other variants of the graph
    checks_candidates: bool = False  # repeat it with candidates in place of all logits
    padded_sequences: tuple[int, ...] = ()  # fed as one padded batch; compares all positions


def cases_for(
    runtime: Runtime, config: Gemma3Config, sequences: Sequences, options: VerifyOptions
) -> list[Case]:
    """Return the cases that the runtime and the model support; ``config`` is the reference's."""
    window, long = config.sliding_window, len(sequences[LONG].ids)
    lengths = sorted(
        {min(n, long) for n in (window - 1, window, window + 1, 2 * window + 3) if n > 0}
    )
    cases = [
        Case(
            f"prefill-{n}",
            f"{n} tokens in one step",
            partial(prefill, sequences=sequences, length=n),
        )
        for n in lengths
    ]
    chunk = chunk_size(config, lengths[-1])
    start = decode_start(config, options)
    steps = min(options.decode_steps, long - start)
    cases += [
        Case(
            "chunked",
            f"{lengths[-1]} tokens in chunks of {chunk}, the last few one at a time",
            partial(chunked, sequences=sequences, length=lengths[-1], chunk=chunk, window=window),
            checks_variants=True,
        ),
        Case(
            "decode",
            f"{steps} cached steps after {start} tokens, across the window's edge",
            partial(decode, sequences=sequences, start=start, steps=steps),
            checks_variants=True,
            checks_candidates=True,
        ),
        Case(
            "ragged-batch",
            "three rows of different lengths, decoded together",
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
                partial(padded_batch, sequences=sequences),
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
    """Return a chunk size near a fifth of the window that divides neither it nor ``length``."""
    window = config.sliding_window
    chunk = max(2, min(window, length) // 5)
    while chunk < length and (length % chunk == 0 or window % chunk == 0):
        chunk += 1
    return chunk


def logits_to_keep(runtime: Runtime, count: int, wanted: int = KEPT) -> int:
    """Return ``num_logits`` for a step of ``count`` tokens; 0 keeps all if they are small."""
    if count * runtime.config.vocab_size * 4 <= KEEP_ALL_BYTES:
        return 0
    return min(wanted, count)


def prefill(runtime: Runtime, *, sequences: Sequences, length: int) -> Iterator[Observation]:
    """Feed the whole prefix in one step."""
    feed = TeacherForcing(runtime, sequences, [LONG])
    yield from feed.step(length, keep=logits_to_keep(runtime, length))
    yield from feed.read()


def chunked(
    runtime: Runtime, *, sequences: Sequences, length: int, chunk: int, window: int
) -> Iterator[Observation]:
    """Feed chunks of several tokens across the window's edge, then single tokens."""
    feed = TeacherForcing(runtime, sequences, [LONG])
    singles = min(KEPT, length - 1)
    while left := length - singles - feed.fed[0]:
        count = min(chunk, left)
        crosses = feed.fed[0] < window <= feed.fed[0] + count
        yield from feed.step(
            count, keep=logits_to_keep(runtime, count, KEPT_AT_EDGE if crosses else KEPT)
        )
    for _ in range(singles):
        yield from feed.step(1)
    yield from feed.read()


def decode(
    runtime: Runtime, *, sequences: Sequences, start: int, steps: int
) -> Iterator[Observation]:
    """Feed single tokens after a prefix."""
    feed = TeacherForcing(runtime, sequences, [LONG])
    yield from feed.step(start, keep=1)
    for _ in range(steps):
        yield from feed.step(1)
    yield from feed.read()


def ragged_batch(runtime: Runtime, *, sequences: Sequences, window: int) -> Iterator[Observation]:
    """Prefill rows one at a time, one to just before the window's edge, then step jointly."""
    rows = [SHORT[0], LONG, SHORT[1]]
    feed = TeacherForcing(runtime, sequences, rows)
    shortest = min(len(sequences[row].ids) for row in rows)
    steps = min(BATCH_STEPS, shortest - 1)
    for index, row in enumerate(rows):
        length = len(sequences[row].ids) - steps
        if row == LONG:
            length = max(1, min(length, window - steps // 2))
        yield from feed.step(length, keep=1, row=index)
    for _ in range(steps):
        yield from feed.step(1)
    yield from feed.read()


def equal_batch(runtime: Runtime, *, sequences: Sequences) -> Iterator[Observation]:
    """Feed two rows of equal length in joint steps of several tokens, then of one."""
    feed = TeacherForcing(runtime, sequences, SHORT)
    length = min(len(sequences[row].ids) for row in SHORT)
    yield from feed.step(max(1, length // 2), keep=1)
    if feed.fed[0] + 2 < length:
        yield from feed.step(2)
    while feed.fed[0] < length:
        yield from feed.step(1)
    yield from feed.read()


def kept_logits(runtime: Runtime, *, sequences: Sequences) -> Iterator[Observation]:
    """Feed the same prompt with ``num_logits`` 0 (all), 1 and 3, and its first half with none."""
    length = len(sequences[SHORT[1]].ids)
    for keep in (0, 1, 3):
        feed = TeacherForcing(runtime, sequences, [SHORT[1]])
        yield from feed.step(length, keep=min(keep, length))
    feed = TeacherForcing(runtime, sequences, [SHORT[1]])
    if length > 1:
        feed.step(length // 2, keep=NO_LOGITS)
    yield from feed.step(length - feed.fed[0], keep=1)


def text(runtime: Runtime, *, sequences: Sequences, index: int) -> Iterator[Observation]:
    """Feed a text prompt in one step and compare all its logits."""
    feed = TeacherForcing(runtime, sequences, [index])
    yield from feed.step(len(sequences[index].ids))
    yield from feed.read()


def padded_batch(runtime: Runtime, *, sequences: Sequences) -> Iterator[Observation]:
    """Prefill two sequences of different lengths in one padded batch without a past.

    Our own generation loop never pads, but other consumers do: on the left where positions come
    from the mask, and on the right where GroupQueryAttention takes lengths from the mask's sums.
    """
    assert isinstance(runtime, PaddedBatches)
    side = runtime.padding_side
    assert side is not None
    ids, mask = pad([sequences[row].ids for row in SHORT], runtime.config.pad_token_id, side)
    logits, present = runtime.run_padded(ids, mask)
    for index, row in enumerate(SHORT):
        keep = np.flatnonzero(mask[index])
        layers = [
            (key[index][:, keep], value[index][:, keep])
            for key, value in zip(present[::2], present[1::2], strict=True)
        ]
        yield LogitObservation(row, np.arange(len(keep)), logits[index][keep], step=0)
        if not present:
            continue
        required = required_tokens(runtime.config, len(keep))
        yield CacheObservation(row, len(keep), layers, required)


def pad(rows: Sequence[IntArray], token_id: int, side: PaddingSide) -> tuple[IntArray, IntArray]:
    """Return padded ids and their mask, both [B, T]."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), token_id, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, part], mask[index, part] = row, 1
    return ids, mask


class PlanningCache:
    """The cache of :class:`PlanningRuntime`; it counts tokens and holds none."""

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.lengths: IntArray = np.zeros(batch_size, np.int64)

    def read(self, row: int) -> list[LayerKV]:
        """Return nothing."""
        del row
        return []

    def truncate(self, row: int, length: int) -> None:
        """Do nothing."""
        del row, length

    def swap(self, row: int, other: int) -> None:
        """Do nothing."""
        del row, other


class PlanningRuntime:
    """A :class:`gemma3_export.runtimes.protocol.Runtime` for dry runs, which computes nothing."""

    info = RuntimeInfo(
        name="dry-run", dtype="float32", compute_dtype="float32", device=Device("cpu")
    )

    def __init__(self, config: Gemma3Config) -> None:
        self.config = config
        self.work = 0  # of the steps so far

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return a cache that holds nothing."""
        return PlanningCache(batch_size, capacity)

    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """Return logits with an empty vocabulary."""
        del cache, row
        rows, new = input_ids.shape
        self.work += STEP_WORK + rows * new
        return np.zeros((rows, count_logits(num_logits, new), 0), np.float32)


def needed_positions(
    config: Gemma3Config, cases: Sequence[Case], sequences: Sequence[TokenSequence]
) -> dict[int, set[int]]:
    """Return the positions of each sequence whose logits the cases compare, from a dry run."""
    runtime = PlanningRuntime(config)
    needed: dict[int, set[int]] = {}
    for case in cases:
        if case.padded_sequences:
            needed |= {
                index: set(range(len(sequences[index].ids))) for index in case.padded_sequences
            }
            continue
        for item in case.run(runtime):
            if isinstance(item, LogitObservation):
                needed.setdefault(item.sequence, set()).update(item.positions.tolist())
    return needed


def work_of(config: Gemma3Config, case: Case, sequences: Sequence[TokenSequence]) -> list[int]:
    """Return the work up to each observation of a case, in tokens, from a dry run."""
    if case.padded_sequences:
        return [STEP_WORK + sum(len(sequences[index].ids) for index in case.padded_sequences)]
    runtime = PlanningRuntime(config)
    return [runtime.work for _ in case.run(runtime)]
