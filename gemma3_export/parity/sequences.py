"""The token sequences that every case reads from: seeded ids, and short texts.

A model with a causal mask gives a prefix the same logits and keys whether or not more tokens
follow, so one long sequence serves all lengths, and its truth is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.runtimes.protocol import IntArray, LayerKV, Logits, Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = [
    "CacheRead",
    "Observation",
    "Seen",
    "TeacherForcing",
    "TokenSequence",
    "decode_start",
    "least_tokens",
    "sequences_for",
]

TEXTS = {
    "English prose": (
        "The lighthouse keeper counted nine ships that evening, and wrote each name down in the "
        "same careful hand her father had used. When the tenth came in without lights, she did "
        "not write anything at all."
    ),
    "Python": (
        "def rolling_mean(values: list[float], width: int) -> list[float]:\n"
        "    total = sum(values[:width])\n"
        "    means = [total / width]\n"
        "    for old, new in zip(values, values[width:]):\n"
    ),
    "German and French": (
        "Am Morgen lag Nebel über dem Fluß, und die Brücke war nur zur Hälfte zu sehen. "
        "Personne ne savait où menait l'autre moitié, mais tout le monde y allait."
    ),
    "Japanese, Arabic and Hindi": (
        "駅前の小さな本屋は、雨の日だけ店を開ける。 المكتبة الصغيرة تفتح أبوابها في المطر. "
        "छोटी किताबों की दुकान बारिश में खुलती है।"
    ),
    "numbers and symbols": (
        "Order #20417: 3 * 12.50 € = 37.50 €; VAT (19 %) = 7.13 €; total 44.63 € → paid "
        '{"status": "ok", "items": [1, 2, 3]} 🎉'
    ),
}
SHORT_LENGTHS = (37, 20)  # two more random sequences, of different length, for batches


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A named list of token ids [S]."""

    name: str
    ids: IntArray
    is_text: bool = False


def sequences_for(
    config: Gemma3Config, options: VerifyOptions, tokenizer: Tokenizer | None
) -> list[TokenSequence]:
    """The long random sequence, two short ones, and the texts when there is a tokenizer."""
    context = config.max_position_embeddings
    long = max(2 * config.sliding_window + 3, decode_start(config, options) + options.decode_steps)
    sequences = [
        TokenSequence("random", random_ids(config, options.seed, 0, min(long, context))),
        *(
            TokenSequence(f"random {index}", random_ids(config, options.seed, index, length))
            for index, length in enumerate((min(n, context) for n in SHORT_LENGTHS), start=1)
        ),
    ]
    if tokenizer is not None:
        limit = min(options.prompt_tokens, context)
        for name, text in TEXTS.items():
            ids = np.array(tokenizer.encode(text)[:limit], np.int64)
            sequences.append(TokenSequence(name, ids, is_text=True))
    return sequences


def decode_start(config: Gemma3Config, options: VerifyOptions) -> int:
    """Tokens before the first decoded one: half of the steps lie before the window's edge."""
    start = config.sliding_window - options.decode_steps // 2
    return max(1, min(start, config.max_position_embeddings - options.decode_steps))


def random_ids(config: Gemma3Config, seed: int, stream: int, length: int) -> IntArray:
    """Token ids [length], the first of them bos; the same on every machine."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream]))
    ids = generator.integers(0, config.vocab_size, length, dtype=np.int64)
    ids[0] = config.bos_token_id
    return ids


# What a case sees of a runtime: logits at known places, and caches.
#
# Shapes: P compared positions, V vocabulary.


@dataclass(frozen=True, slots=True)
class Observation:
    """Logits [P, V] that a step gave for consecutive positions of one sequence."""

    sequence: int
    positions: IntArray  # [P] index of the token whose successor the logits predict
    logits: Logits
    step: int  # of the case, from 0
    first_new: int  # position of the step's first token: what was cached before it


@dataclass(frozen=True, slots=True)
class CacheRead:
    """One row's cache after ``length`` tokens of a sequence."""

    sequence: int
    length: int
    layers: list[LayerKV]
    least: list[int]  # tokens that each layer has to hold still


Seen = Observation | CacheRead


class TeacherForcing:
    """Feeds sequences to the rows of one cache, whatever the runtime would have said."""

    def __init__(
        self, runtime: Runtime, sequences: Sequence[TokenSequence], rows: Sequence[int]
    ) -> None:
        self.runtime = runtime
        self.sequences = sequences
        self.rows = list(rows)
        self.fed = [0] * len(self.rows)
        self.steps = 0
        capacity = max(len(sequences[row].ids) for row in rows)
        self.cache = runtime.new_cache(len(self.rows), capacity)

    def step(self, count: int, *, keep: int = 0, row: int | None = None) -> list[Observation]:
        """Feed the next ``count`` tokens of one row, or of all; keep the last ``keep`` logits."""
        rows = range(len(self.rows)) if row is None else [row]
        ids = [self.sequences[self.rows[r]].ids[self.fed[r] : self.fed[r] + count] for r in rows]
        logits = self.runtime.step(
            np.ascontiguousarray(np.stack(ids)), self.cache, num_logits=keep, row=row
        )
        seen = []
        for index, r in enumerate(rows):
            start = self.fed[r]
            self.fed[r] += count
            positions = np.arange(self.fed[r] - (keep or count), self.fed[r])
            seen.append(
                Observation(self.rows[r], positions, logits[index], self.steps, first_new=start)
            )
        self.steps += 1
        return seen

    def read(self) -> list[CacheRead]:
        """Every row's cache."""
        return [
            CacheRead(
                sequence,
                self.fed[row],
                self.cache.read(row),
                least_tokens(self.runtime.config, self.fed[row]),
            )
            for row, sequence in enumerate(self.rows)
        ]


def least_tokens(config: Gemma3Config, length: int) -> list[int]:
    """What each layer's cache must hold of ``length`` tokens: all, or what the next can see."""
    window = config.sliding_window - 1  # the next token is in its own window
    return [
        min(length, window) if config.is_sliding(layer) else length
        for layer in range(config.num_hidden_layers)
    ]
