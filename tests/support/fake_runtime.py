"""Fake runtimes whose logits are a function of the whole token history of a row.

Mixing up rows or order, or losing or repeating a token, therefore changes the text.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Sequence

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVSegment,
    LayerKV,
    Logits,
    RuntimeInfo,
    check_capacity,
    check_export,
    check_rows,
    check_segment,
    check_truncation,
    num_logits_to_keep,
)
from tests.support.tiny_models import tiny_config

FAKE_CONFIG = tiny_config(vocab_size=256, max_position_embeddings=128, eos_token_id=(1, 7))


class FakeCache:
    """A cache that stores tokens instead of keys and values."""

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.histories: list[list[int]] = [[] for _ in range(batch_size)]
        self._capacity = capacity

    @property
    def batch_size(self) -> int:
        return len(self.histories)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def lengths(self) -> IntArray:
        return np.array([len(history) for history in self.histories], dtype=np.int64)

    def read(self, row: int) -> list[LayerKV]:
        raise NotImplementedError

    def truncate(self, row: int, length: int) -> None:
        check_truncation(self, row, length)
        del self.histories[row][length:]

    def swap(self, row: int, other: int) -> None:
        check_rows(self, row, other)
        rows = self.histories
        rows[row], rows[other] = rows[other], rows[row]

    @property
    def layout(self) -> str:
        return "tokens"

    @property
    def kv_bytes_per_token(self) -> int:
        return 8

    def tokens_within(self, size_bytes: int) -> int:
        return size_bytes // self.kv_bytes_per_token

    def export_tokens(self, row: int, start: int, stop: int) -> KVSegment:
        check_export(self, row, start, stop)
        tokens = np.array(self.histories[row][start:stop])
        return KVSegment(
            tensors=[tokens], length=tokens.size, layout=self.layout, size_bytes=tokens.nbytes
        )

    def load_tokens(self, row: int, segment: KVSegment, count: int) -> None:
        check_segment(self, row, segment, count)
        self.histories[row] += segment.tensors[0][:count].tolist()


class FakeRuntime:
    """A runtime whose logits are normal noise, seeded by a hash of the row's history."""

    def __init__(self, config: Gemma3Config = FAKE_CONFIG) -> None:
        self._config = config
        self.calls: list[tuple[tuple[int, ...], int]] = []  # shape of input_ids, and first row
        self.num_logits: list[int] = []  # of each step
        self.cache: FakeCache | None = None

    @property
    def config(self) -> Gemma3Config:
        return self._config

    @property
    def info(self) -> RuntimeInfo:
        return RuntimeInfo(
            name="dry-run", dtype="float32", compute_dtype="float32", device=Device("cpu")
        )

    def new_cache(self, batch_size: int, capacity: int) -> FakeCache:
        assert capacity <= self.config.max_position_embeddings
        self.cache = FakeCache(batch_size, capacity)
        return self.cache

    def step(
        self, input_ids: IntArray, cache: FakeCache, *, num_logits: int, row: int = 0
    ) -> Logits:
        assert input_ids.dtype == np.int64
        count, new_tokens = input_ids.shape
        rows = range(row, row + count)
        check_capacity(cache, new_tokens, row, count)
        self.calls.append((input_ids.shape, row))
        self.num_logits.append(num_logits)
        logits = []
        for index, ids in zip(rows, input_ids, strict=True):
            history = cache.histories[index]
            per_token = []
            for token_id in ids:
                history.append(int(token_id))
                per_token.append(self.logits_after(history))
            logits.append(per_token[-num_logits_to_keep(num_logits, new_tokens) :])
        return np.array(logits, dtype=np.float32)

    def logits_after(self, history: Sequence[int]) -> Logits:
        digest = hashlib.blake2b(np.array(history, dtype=np.int64).tobytes(), digest_size=8)
        generator = np.random.default_rng(int.from_bytes(digest.digest()))
        logits = generator.standard_normal(self.config.vocab_size) * 4
        logits[list(self.config.eos_token_id)] = -20  # ends are put in by the scripts below
        return logits.astype(np.float32)


class ScriptedRuntime(FakeRuntime):
    """Continues a prompt with the script that belongs to its first token, as bytes."""

    def __init__(self, scripts: dict[int, bytes], config: Gemma3Config = FAKE_CONFIG) -> None:
        super().__init__(config)
        self.scripts = scripts
        self.prompt_tokens = 1

    def logits_after(self, history: Sequence[int]) -> Logits:
        logits = np.zeros(self.config.vocab_size, dtype=np.float32)
        script = self.scripts[history[0]]
        position = len(history) - self.prompt_tokens
        if 0 <= position < len(script):
            logits[script[position]] = 10
        return logits


class ByteDecoder:
    """Token ids are bytes of UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, /) -> str:
        return self._decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
