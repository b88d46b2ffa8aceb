"""The cases: ways of feeding the same tokens that must all give the same numbers.

Every case yields what it saw (:mod:`gemma3_export.parity.observations`); judging is done elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.parity.observations import Seen, TeacherForcing
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.padding import accepts_padding, padded_batch
from gemma3_export.parity.sequences import TokenSequence, decode_start
from gemma3_export.runtimes.protocol import Runtime

__all__ = ["Case", "cases_for", "chunk_size"]

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
        ),
        Case(
            "decode",
            f"{steps} cached steps after {start} tokens, across the window",
            partial(decode, sequences=sequences, start=start, steps=steps),
        ),
        Case(
            "ragged-batch",
            "three rows of different length, decoded together",
            partial(ragged_batch, sequences=sequences, window=window),
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
    if accepts_padding(runtime):
        cases.append(
            Case("padded", "two rows in one padded batch", partial(padded, sequences=sequences))
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
