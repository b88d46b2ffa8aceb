"""Observe everything that a runtime computes on a tiny model, and measure its error."""

from __future__ import annotations

import functools

import numpy as np
import torch

from gemma3_export.config import Gemma3Config
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.protocol import Runtime
from tests.support.tiny_models import tiny_config

SEED = 11
VARIANTS: dict[str, Gemma3Config] = {
    "tied": tiny_config(),
    "untied": tiny_config(tie_word_embeddings=False),
    "one sliding layer": tiny_config(num_hidden_layers=1, layer_types=("sliding_attention",)),
    "one full layer": tiny_config(num_hidden_layers=1, layer_types=("full_attention",)),
    "one full layer, untied": tiny_config(
        num_hidden_layers=1, layer_types=("full_attention",), tie_word_embeddings=False
    ),
    "two layers": tiny_config(
        num_hidden_layers=2, layer_types=("full_attention", "sliding_attention")
    ),
    "wide": tiny_config(  # most of the file is weights
        vocab_size=60_000, hidden_size=64, num_hidden_layers=1, layer_types=("full_attention",)
    ),
}


def source_of(variant: str) -> RandomSource:
    """Return the weights of a variant."""
    return RandomSource(VARIANTS[variant], SEED)


def reference(variant: str, dtype: torch.dtype) -> ReferenceRuntime:
    return ReferenceRuntime(load_reference(source_of(variant), dtype))


def observe(runtime: Runtime) -> list[np.ndarray]:
    """Return logits and caches of all ways to run a model, on both sides of the sliding window."""
    ids = np.random.default_rng(5).integers(3, runtime.config.vocab_size, (3, 24))
    seen: list[np.ndarray] = []
    whole = runtime.new_cache(1, 24)
    seen.append(runtime.step(ids[:1, :15], whole, num_logits=0))  # prefill
    seen += [runtime.step(ids[:1, at : at + 1], whole, num_logits=1) for at in range(15, 19)]
    seen.append(runtime.step(ids[:1, 19:], whole, num_logits=2))  # several tokens on a cache
    chunked = runtime.new_cache(1, 15)
    for start, stop in ((0, 4), (4, 5), (5, 15)):
        seen.append(runtime.step(ids[:1, start:stop], chunked, num_logits=0))
    ragged = runtime.new_cache(3, 24)
    for row, length in enumerate((3, 13, 1)):
        seen.append(runtime.step(ids[row : row + 1, :length], ragged, num_logits=1, row=row))
    seen += [runtime.step(ids[:, at : at + 1], ragged, num_logits=1) for at in range(13, 17)]
    for cache in (whole, chunked, ragged):
        for row in range(cache.batch_size):
            seen += [tensor for pair in cache.read(row) for tensor in pair]
    return seen


@functools.cache
def expected(variant: str) -> list[np.ndarray]:
    return observe(reference(variant, torch.float64))


def errors(variant: str, runtime: Runtime) -> list[float]:
    """Return the largest error of each observed array against the reference in float64."""
    return [
        float(np.abs(found - exact).max())
        for found, exact in zip(observe(runtime), expected(variant), strict=True)
    ]
