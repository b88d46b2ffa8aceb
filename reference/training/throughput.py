"""How fast training is, and which share of the machine's arithmetic it uses."""

from __future__ import annotations

import functools
from time import perf_counter

import torch

from gemma3_export.config.gemma3_config import Gemma3Config

__all__ = ["flops_per_token", "measure_peak_flops"]

PROBE_SIZE = 512
PROBE_SECONDS = 0.3


def flops_per_token(config: Gemma3Config, context_length: int) -> float:
    """Multiplications and additions of forward and backward pass for one token of a window.

    Counts matrix products and attention, as the PaLM paper does (arXiv:2204.02311, appendix B), but
    each attention layer for the keys it really sees: on average half the window, or the sliding
    window where that is shorter. Recomputation does not count.
    """
    head_or_embedding = config.vocab_size * config.hidden_size
    matrices = sum(
        shape[0] * shape[1] for _, shape in config.weight_shapes() if len(shape) == 2
    ) - head_or_embedding * (0 if config.tie_word_embeddings else 1)
    attention = 0.0
    for layer in range(config.num_hidden_layers):
        window = config.sliding_window if config.is_sliding(layer) else context_length
        attention += 2 * config.query_size * _mean_keys(context_length, window)
    return 6.0 * (matrices + attention)


def _mean_keys(context_length: int, window: int) -> float:
    """Keys that a query of a window of text sees, on average."""
    window = min(window, context_length)
    growing = window * (window + 1) / 2
    return (growing + (context_length - window) * window) / context_length


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a large matrix product reaches here: what MFU is a share of.

    A measured peak needs no table of devices, and holds for a processor as well. On one without
    arithmetic in ``dtype``, float32 is the faster of the two, and what decides.
    """
    return max(_probe(device, kind) for kind in {dtype, torch.float32})


@functools.cache  # a device does not change while a process lives
def _probe(device: torch.device, dtype: torch.dtype) -> float:
    size = PROBE_SIZE * (16 if device.type == "cuda" else 1)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, began = float("inf"), perf_counter()
    while perf_counter() - began < PROBE_SECONDS:
        started = perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        best = min(best, perf_counter() - started)
    return 2.0 * size**3 / best
