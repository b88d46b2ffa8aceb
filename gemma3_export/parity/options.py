"""Define the options of a parity check, and derive its precision and threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import require_max_kld, torch_dtype
from gemma3_export.errors import InputError
from gemma3_export.limits import MAX_SEED, check_integer
from gemma3_export.processors import chosen_threads
from gemma3_export.runtimes.protocol import RuntimeInfo

__all__ = [
    "HalfPrecision",
    "VerifyOptions",
    "noise_floor_dtype",
    "threads_for",
    "torch_threads",
]

SMALL_MATRIX = 4_000_000  # elements; smaller products do not run faster on a second thread


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """Everything that a report must record to be reproducible.

    Raises:
        InputError: a value is out of range.
    """

    seed: int = 0  # of the random token ids
    decode_steps: int = 64  # cached single-token steps, half of them before the window's edge
    greedy_steps: int = 16  # decode steps whose tokens the reference itself chooses
    prompt_tokens: int = 32  # maximum length of a text prompt
    factor: float = 8.0  # largest allowed error as a multiple of the noise floor; see judge.py
    max_mean_kld: float = 0.01  # gate B, nats per token
    min_top1: float = 0.93  # gate B, share of positions
    max_perplexity_ratio: float = 1.03  # gate B
    locate: bool = True  # find the first diverging layer after a failure

    @classmethod
    def for_budget(cls, max_mean_kld: float, *, seed: int = 0) -> VerifyOptions:
        """Derive all thresholds of gate B from one: the mean KL divergence.

        In four formats of other engines, with a KLD of 0.004 to 0.6 on the 270M, 0.44 to 0.51
        sqrt(KLD) of the greedy tokens changed; in our own two, 0.6 to 0.8 sqrt(KLD) at 0.005. The
        limit on the growth of the perplexity, three times the KLD, is a choice.

        Raises:
            InputError: the budget is not a positive number.
        """
        return cls(
            seed=seed,
            max_mean_kld=require_max_kld(max_mean_kld),
            min_top1=max(0.0, 1 - 0.7 * math.sqrt(max_mean_kld)),
            max_perplexity_ratio=math.exp(3 * max_mean_kld),
        )

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0, MAX_SEED)
        for name in ("decode_steps", "prompt_tokens"):
            check_integer(name, getattr(self, name))
        if not self.factor >= 1:
            raise InputError(f"the parity factor is {self.factor}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfPrecision:
    """The parts of a graph that are held in a 16-bit dtype; products always are."""

    dtype: torch.dtype
    holds_residual: bool  # otherwise the residual stream and the norms are float32
    holds_matrices: bool = True  # otherwise the matrices are quantized

    @classmethod
    def of_runtime(cls, info: RuntimeInfo) -> HalfPrecision | None:
        """Return what a runtime holds in 16 bits, or None if it computes in a wider dtype."""
        dtype = noise_floor_dtype(info)
        if dtype.itemsize != 2:
            return None
        return cls(
            dtype=dtype,
            holds_residual=info.residual_dtype in (None, info.compute_dtype),
            holds_matrices=info.activation_dtype is None,
        )


def noise_floor_dtype(info: RuntimeInfo) -> torch.dtype:
    """Return the precision whose rounding is the noise floor of a runtime.

    A float64 runtime gets the noise floor of float32, because no more precise reference exists.
    """
    return torch.float32 if info.compute_dtype == "float64" else torch_dtype(info.compute_dtype)


def threads_for(config: Gemma3Config, threads: int | None) -> int | None:
    """Return the number of threads for an export and its parity check.

    PyTorch and ONNX Runtime both spin between operators. When operators are tiny and other programs
    compete for the cores, handing work to a second thread can take minutes instead of a second.

    Args:
        config: the model.
        threads: the requested number; None selects one if even the largest matrix, usually the
            head, is small, and otherwise all cores (again None) that this process may use.

    Raises:
        InputError: ``threads`` is less than 1, or more than a few times the processors.
    """
    chosen = chosen_threads(threads)
    largest = max(math.prod(shape) for _, shape in config.weight_shapes())
    if threads is None and largest < SMALL_MATRIX:
        return 1
    return chosen


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set PyTorch's intra-op threads within a ``with`` block; None changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
