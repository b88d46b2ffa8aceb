"""Folders of token ids, and tiny models to train on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.config import Gemma3Config, config_to_json
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.token_data import (
    BEGINS_DOCUMENT,
    EXAMPLES_VERSION,
    IS_LEARNED,
    META,
    TokenMeta,
    marks_name,
    token_dtype,
)
from tests.support.tiny_models import tiny_config

VOCAB_SIZE = 20


def write_tokens(
    folder: Path,
    train: NDArray[np.int64],
    validation: NDArray[np.int64] | None = None,
    vocab_size: int = VOCAB_SIZE,
    fingerprint: str = "none",
) -> Path:
    """Write a folder as ``gemma3-export data`` does, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": train,
        "validation": np.zeros(0, np.int64) if validation is None else validation,
    }
    for name, ids in splits.items():
        (folder / f"{name}.bin").write_bytes(ids.astype(token_dtype(vocab_size)).tobytes())
    counts = {name: int(ids.size) for name, ids in splits.items()}
    meta = TokenMeta(
        format_version=1,
        vocab_size=vocab_size,
        dtype=token_dtype(vocab_size).name,
        tokenizer_fingerprint=fingerprint,
        bos_token_id=2,
        eos_token_id=1,
        tokens=counts,
        documents=counts,
        characters=counts,
        source={"kind": "test"},
    )
    (folder / META).write_text(json.dumps(meta.to_json()))
    return folder


def write_examples(
    folder: Path, examples: Mapping[str, list[tuple[list[int], list[int]]]], **meta: Any
) -> Path:
    """Write a folder of examples: token ids, and 1 for those that are learned, by split."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(VOCAB_SIZE)
    tokens, documents, learned = ({"train": 0, "validation": 0} for _ in range(3))
    for split in tokens:
        ids, marks = [], []
        for found, is_learned in examples.get(split, []):
            ids += found
            marks += [BEGINS_DOCUMENT * (not i) | is_learned[i] for i in range(len(found))]
        (folder / f"{split}.bin").write_bytes(np.array(ids, dtype).tobytes())
        (folder / marks_name(split)).write_bytes(bytes(marks))
        tokens[split], documents[split] = len(ids), len(examples.get(split, []))
        learned[split] = sum(mark & IS_LEARNED for mark in marks)
    about = TokenMeta(
        format_version=EXAMPLES_VERSION,
        vocab_size=VOCAB_SIZE,
        dtype=dtype.name,
        tokenizer_fingerprint="none",
        bos_token_id=2,
        eos_token_id=1,
        tokens=tokens,
        documents=documents,
        characters=tokens,
        source={"kind": "test"},
        loss_on="answers",
        learned_tokens=learned,
    )
    (folder / META).write_text(json.dumps(about.to_json() | meta))
    return folder


def random_examples(
    count: int, seed: int = 0, longest: int = 24
) -> list[tuple[list[int], list[int]]]:
    """Return examples of different lengths, each with some tokens that are learned."""
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(generator.integers(3, longest))
        learned = (generator.random(length) < 0.4).astype(int)
        learned[0], learned[-1] = 0, 1
        ids = [2, *generator.integers(4, VOCAB_SIZE, length - 1).tolist()]
        examples.append((ids, learned.tolist()))
    return examples


def random_tokens(count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(4, VOCAB_SIZE, count)


def small_config(**overrides: Any) -> Gemma3Config:
    """Return a config with one layer of each kind and a window shorter than the text."""
    shapes: Mapping[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": ("sliding_attention", "full_attention"),
        "initializer_range": 0.02,
        "rope_scaling_factor": 1.0,
        "eos_token_id": (1,),
    }
    return tiny_config(**{**shapes, **overrides})


def write_config(path: Path, config: Gemma3Config | None = None) -> Path:
    path.write_text(json.dumps(config_to_json(config or small_config())))
    return path


def quick_options(**overrides: Any) -> TrainOptions:
    base: dict[str, Any] = {
        "steps": 8,
        "batch_size": 4,
        "context_length": 16,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "eval_interval": 4,
        "eval_batches": 2,
        "checkpoint_interval": 2,
        "log_interval": 1,
        "device": "cpu",
    }
    return TrainOptions(**{**base, **overrides})
