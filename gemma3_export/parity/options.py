"""What a parity check is asked to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import require_max_kld, torch_dtype
from gemma3_export.errors import InputError
from gemma3_export.runtimes.protocol import RuntimeInfo

__all__ = [
    "SMALL_PARAMETERS",
    "HalfPrecision",
    "VerifyOptions",
    "floor_dtype",
    "threads_for",
    "torch_threads",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """Everything that a report must repeat to be reproducible.

    Raises:
        InputError: a value is out of range.
    """

    seed: int = 0  # of the random token ids
    decode_steps: int = 64  # cached single-token steps, half of them before the window's edge
    greedy_steps: int = 16  # of these, how many tokens the reference itself chooses
    prompt_tokens: int = 32  # longest text prompt
    factor: float = 8.0  # how far above the noise floor an error may lie; see judge.py
    max_mean_kld: float = 0.01  # gate B, nats a token
    min_top1: float = 0.93  # gate B, share of positions
    max_perplexity_ratio: float = 1.03  # gate B
    locate: bool = True  # look for the first diverging layer when something fails

    @classmethod
    def for_budget(cls, max_mean_kld: float, *, seed: int = 0) -> VerifyOptions:
        """Gate B with one number: the other two limits are what such a divergence brings along.

        In four formats of other engines, with a KLD of 0.004 to 0.6 on the 270M, 0.44 to 0.51
        sqrt(KLD) of the greedy choices changed; in our own two, 0.6 to 0.8 at 0.005. That the
        perplexity may grow by three times the KLD is a choice.

        Raises:
            InputError: the budget is no positive number.
        """
        return cls(
            seed=seed,
            max_mean_kld=require_max_kld(max_mean_kld),
            min_top1=max(0.0, 1 - 0.7 * math.sqrt(max_mean_kld)),
            max_perplexity_ratio=math.exp(3 * max_mean_kld),
        )

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise InputError(f"the parity seed is {self.seed}; it must be within 0 and 2^63")
        for name in ("decode_steps", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.factor >= 1:
            raise InputError(f"the parity factor is {self.factor}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfPrecision:
    """What a graph holds in a 16-bit type: products, what lies between them, and maybe more."""

    dtype: torch.dtype
    holds_residual: bool  # else residual stream and norms are float32
    holds_matrices: bool = True  # else they are quantised

    @classmethod
    def of_runtime(cls, info: RuntimeInfo) -> HalfPrecision | None:
        """Return what a runtime holds in 16 bits; None if it computes in a wider type."""
        dtype = floor_dtype(info)
        if dtype.itemsize != 2:
            return None
        return cls(
            dtype=dtype,
            holds_residual=info.residual_dtype in (None, info.compute_dtype),
            holds_matrices=info.activation_dtype is None,
        )


def floor_dtype(info: RuntimeInfo) -> torch.dtype:
    """Return the precision whose own rounding is a runtime's noise floor.

    A float64 runtime is held to the floor of float32: no better ground truth exists for it.
    """
    return torch.float32 if info.compute_dtype == "float64" else torch_dtype(info.compute_dtype)


# How many threads an export and its parity check use, in torch and in ONNX Runtime.
#
# Both keep their threads spinning between operators. Where operators are tiny and other
# programs want
# the processors too, handing work over takes minutes instead of a second.

SMALL_PARAMETERS = 20_000_000  # fewer than these gain nothing from a second thread


def threads_for(config: Gemma3Config, threads: int | None) -> int | None:
    """``threads``; if None, one for a small model, and None (all processors) for others.

    Raises:
        InputError: less than one.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; give at least 1")
    if threads is None and config.num_parameters < SMALL_PARAMETERS:
        return 1
    return threads


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch's operators use ``threads`` inside, and what they used before afterwards."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
