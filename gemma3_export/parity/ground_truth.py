"""Compute the ground truth for one set of weights: expected values and their noise floor."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from gemma3_export.bundle import BlockFormat
from gemma3_export.parity.expected import ExpectedFromReference, with_greedy_tokens
from gemma3_export.parity.noise_floor import NoiseFloor
from gemma3_export.parity.options import HalfPrecision, VerifyOptions, noise_floor_dtype
from gemma3_export.parity.rounding import ActivationRounding, widen_residual
from gemma3_export.parity.sequences import decode_start, sequences_for
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.weights import WeightSource
from gemma3_export.runtimes.protocol import Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = ["GroundTruth"]


class GroundTruth:
    """Expected values and noise floor for one set of weights, shared by any number of runtimes.

    Args:
        source: the weights that the runtimes should have.
        dtype: the precision of the runtimes.
        options: seed, steps and thresholds.
        tokenizer: adds the text prompts.
        has_wide_residual: keep the residual stream in float32 when ``dtype`` is half precision.

    Raises:
        InputError: a weight holds NaN or infinity, or cannot be read.
    """

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        options: VerifyOptions,
        tokenizer: Tokenizer | None = None,
        *,
        has_wide_residual: bool = False,
    ) -> None:
        self.config = source.config
        self.dtype = dtype
        self.options = options
        self.tokenizer = tokenizer
        self.exact: Gemma3 = load_reference(source, torch.float64)
        # float64 holds every stored dtype exactly, so this equals rounding the source itself.
        self.rounded: Gemma3 = copy.deepcopy(self.exact).to(dtype)
        if has_wide_residual:
            widen_residual(self.rounded)
        self.sequences = sequences_for(source.config, options, tokenizer)
        self.sequences[0] = with_greedy_tokens(
            self.exact,
            self.sequences[0],
            decode_start(source.config, options),
            min(options.greedy_steps, options.decode_steps),
        )
        blocks = source.activation_blocks
        self.expected = self._values(self.exact, blocks)
        rounded = self._values(self.rounded, blocks)
        # For a quantized graph that multiplies in floating point; see rounding.py.
        self.float_expected = ExpectedFromReference(self.exact, self.sequences) if blocks else None
        unquantized = ExpectedFromReference(self.rounded, self.sequences) if blocks else None
        self.noise_floor = NoiseFloor(self.expected, rounded, self.sequences, unquantized)
        self.float_noise_floor = (
            NoiseFloor(self.float_expected, unquantized, self.sequences)
            if self.float_expected is not None and unquantized is not None
            else None
        )

    @classmethod
    def for_runtime(
        cls,
        runtime: Runtime,
        source: WeightSource,
        *,
        options: VerifyOptions | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> GroundTruth:
        """Compute the ground truth in the precision of ``runtime``.

        Raises:
            InputError: see :class:`GroundTruth`.
        """
        half = HalfPrecision.of_runtime(runtime.info)
        return cls(
            source,
            noise_floor_dtype(runtime.info),
            options or VerifyOptions(),
            tokenizer,
            has_wide_residual=half is not None and not half.holds_residual,
        )

    def _values(self, model: Gemma3, blocks: Mapping[str, BlockFormat]) -> ExpectedFromReference:
        rounding = ActivationRounding(model, blocks) if blocks else None
        return ExpectedFromReference(model, self.sequences, rounding)
