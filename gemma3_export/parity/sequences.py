"""Define the token sequences of all cases, and the observations made while feeding them.

With a causal mask, the logits and keys of a prefix do not depend on the tokens that follow. One
long sequence therefore serves all lengths, and its expected values are computed once.

Shapes: P compared positions, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.runtimes.protocol import IntArray, LayerKV, Logits, Runtime, count_logits
from gemma3_export.tokenizer import Tokenizer

__all__ = [
    "CacheObservation",
    "LogitObservation",
    "Observation",
    "TeacherForcing",
    "TokenSequence",
    "decode_start",
    "held_out_sequences",
    "held_out_texts",
    "required_tokens",
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
SHORT_LENGTHS = (37, 20)  # two more random sequences of different lengths, for batches
HELD_OUT_SEPARATOR = "\n---\n"


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A named list of token ids [S]."""

    name: str
    ids: IntArray
    is_text: bool = False


def sequences_for(
    config: Gemma3Config, options: VerifyOptions, tokenizer: Tokenizer | None
) -> list[TokenSequence]:
    """Return one long and two short random sequences, and the texts if there is a tokenizer."""
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
        sequences += [text_sequence(name, text, tokenizer, limit) for name, text in TEXTS.items()]
    return sequences


def held_out_texts() -> list[str]:
    """Return the held-out texts, each 100 to 250 tokens long.

    They were written for this project, so no calibration and no training has seen them: prose,
    code, tables, a letter, questions, and nine languages.
    """
    text = resources.files(__package__).joinpath("held_out.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n").split(HELD_OUT_SEPARATOR)


def held_out_sequences(tokenizer: Tokenizer, limit: int) -> list[TokenSequence]:
    """Return the held-out texts as tokens, each truncated to ``limit``."""
    return [
        text_sequence(f"held out {index}", text, tokenizer, limit)
        for index, text in enumerate(held_out_texts())
    ]


def text_sequence(name: str, text: str, tokenizer: Tokenizer, limit: int) -> TokenSequence:
    """Return the first ``limit`` tokens of a text."""
    return TokenSequence(name, np.array(tokenizer.encode(text)[:limit], np.int64), is_text=True)


def decode_start(config: Gemma3Config, options: VerifyOptions) -> int:
    """Return the prefix length at which half of the decode steps precede the window's edge."""
    start = config.sliding_window - options.decode_steps // 2
    return max(1, min(start, config.max_position_embeddings - options.decode_steps))


def random_ids(config: Gemma3Config, seed: int, stream: int, length: int) -> IntArray:
    """Return token ids [length] that start with bos and are the same on every machine."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream]))
    ids = generator.integers(0, config.vocab_size, length, dtype=np.int64)
    ids[0] = config.bos_token_id
    return ids


@dataclass(frozen=True, slots=True)
class LogitObservation:
    """Logits [P, V] that one step returned for consecutive positions of one sequence."""

    sequence: int
    positions: IntArray  # [P] positions whose next token the logits predict
    logits: Logits
    step: int  # index of the step within the case


@dataclass(frozen=True, slots=True)
class CacheObservation:
    """The cache of one row after ``length`` tokens of a sequence."""

    sequence: int
    length: int
    layers: list[LayerKV]
    required: list[int]  # number of last tokens that each layer must still hold


Observation = LogitObservation | CacheObservation


class TeacherForcing:
    """A feed of given sequences into the rows of one cache, regardless of the predictions."""

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

    def step(self, count: int, *, keep: int = 0, row: int | None = None) -> list[LogitObservation]:
        """Feed the next ``count`` tokens and return the logits of the last ``keep``.

        Args:
            count: tokens per row.
            keep: 0 keeps the logits of all ``count`` tokens, ``NO_LOGITS`` those of none.
            row: the only row to feed; None feeds all rows.
        """
        rows = range(len(self.rows)) if row is None else [row]
        ids = [self.sequences[self.rows[r]].ids[self.fed[r] : self.fed[r] + count] for r in rows]
        logits = self.runtime.step(
            np.ascontiguousarray(np.stack(ids)), self.cache, num_logits=keep, row=row or 0
        )
        observations = []
        for index, r in enumerate(rows):
            self.fed[r] += count
            positions = np.arange(self.fed[r] - count_logits(keep, count), self.fed[r])
            observations.append(
                LogitObservation(self.rows[r], positions, logits[index], self.steps)
            )
        self.steps += 1
        return observations

    def read(self) -> list[CacheObservation]:
        """Return the cache of every row."""
        return [
            CacheObservation(
                sequence,
                self.fed[row],
                self.cache.read(row),
                required_tokens(self.runtime.config, self.fed[row]),
            )
            for row, sequence in enumerate(self.rows)
        ]


def required_tokens(config: Gemma3Config, length: int) -> list[int]:
    """Return how many of ``length`` tokens each layer's cache must hold for the next token."""
    window = config.sliding_window - 1  # the next token belongs to its own window
    return [
        min(length, window) if config.is_sliding(layer) else length
        for layer in range(config.num_hidden_layers)
    ]
