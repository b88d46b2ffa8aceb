"""A peer with known numbers; a file in its model's folder makes it misbehave."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

FIRST_S, DECODE_S = 0.5, 0.25


class FakeCandidate:
    """Answers with constants, without computing."""

    def __init__(self, habits: dict[str, Any], form: str, threads: int) -> None:
        self.habits, self.form, self.threads = habits, form, threads
        self.seen: set[bytes] = set()

    def describe(self) -> dict[str, object]:
        return {
            "runtime": "fake",
            "dtype": self.form,
            "threads": self.habits.get("threads", self.threads),
            "bytes_per_token": 1000,
            "saw_pythonpath": "PYTHONPATH" in os.environ,
            "path": sys.path,
        }

    def run(self, prompt: Any, new_tokens: int) -> tuple[float, float, Any]:
        if self.habits.get("in measurement") == "raise":
            raise RuntimeError("the moon is full")
        if self.habits.get("in measurement") == "die":
            os._exit(7)
        print("a library's chatter on stdout")
        if prompt.tobytes() in self.seen:  # like an engine with a prefix cache
            return FIRST_S / 100, DECODE_S, np.zeros((prompt.shape[0], 1 + new_tokens), np.int64)
        self.seen.add(prompt.tobytes())
        return FIRST_S, DECODE_S, np.zeros((prompt.shape[0], 1 + new_tokens), np.int64)

    def logits(self, ids: Any) -> Any:
        return np.load(self.habits["logits"])[: len(ids)]


def load(model: Path, form: str, threads: int) -> FakeCandidate:
    print("loading", flush=True)
    return FakeCandidate(json.loads((model / "habits.json").read_text()), form, threads)


def convert(source: Path, target: Path, form: str) -> None:
    if form == "bad":
        (target / "half").write_text("a half-written model")
        raise RuntimeError("cannot convert")
    dtypes = (source / "model.safetensors").read_bytes().count(b'"F32"')
    (target / "habits.json").write_text(json.dumps({"tensors": dtypes}))
