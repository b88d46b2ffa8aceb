"""Compute the ground truth for one set of weights: expected values and their noise floor.

Shapes: S tokens, P positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from gemma3_export.config import EMBEDDING
from gemma3_export.parity.differences import LogitComparison
from gemma3_export.parity.expected import ExpectedFromReference, with_greedy_tokens
from gemma3_export.parity.noise_floor import (
    NoiseFloor,
    compare_key_values,
    larger,
    next_ids,
    with_rounding_share,
)
from gemma3_export.parity.options import HalfPrecision, VerifyOptions, noise_floor_dtype
from gemma3_export.parity.reference_pair import ReferencePair, head_blocks
from gemma3_export.parity.rounding import ActivationRounding
from gemma3_export.parity.sequences import TokenSequence, decode_start, sequences_for
from gemma3_export.parity.stored_logits import PositionKey, StoredLogits
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.reference.model import KeyValue
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.runtimes.protocol import Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = ["GroundTruth"]

STAGE = "computing expected values"


class Arithmetic:
    """The reference with float activations, or with activations rounded to int8 as kernels do.

    Args:
        source: the weights.
        sequences: the sequences of the check.
        pair: the passes over the layers.
        plain: the arithmetic with float activations, if this one rounds them.
        progress: called with the stage and how much of it is done.
    """

    def __init__(
        self,
        source: WeightSource,
        sequences: Sequence[TokenSequence],
        pair: ReferencePair,
        plain: Arithmetic | None,
        progress: Progress,
    ) -> None:
        self.source, self.sequences, self.progress = source, sequences, progress
        self.dtype = pair.dtype
        self.plain = plain
        self.models = [forward.model for forward in pair.passes]
        self.rounding = [
            ActivationRounding(model, source.activation_blocks if plain else {}, source.smoothing)
            for model in self.models
        ]
        self.expected = ExpectedFromReference(
            stored=StoredLogits(source.config.vocab_size),
            compute=self.compute,
            caches=[[] for _ in sequences],
        )
        self.noise_floor = NoiseFloor(
            sequences=sequences, compute=self.compute, by_sequence=[[] for _ in sequences]
        )
        self.normed: tuple[list[Tensor], list[Tensor]]  # input [S, D] of the head, by precision
        self.resampled: list[Tensor] = []  # the same of the second sample of the rounded pass

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Compute in this way until the end of the ``with`` block."""
        with self.rounding[0].enabled(), self.rounding[1].enabled():
            yield

    def step(self, pair: ReferencePair, batch: int) -> tuple[KeyValue, KeyValue]:
        """Run a batch through the loaded layer; return exact and rounded keys and values."""
        with self.enabled():
            exact, rounded = (forward.step(batch)[1] for forward in pair.passes)
        return (exact[0][0], exact[1][0]), (rounded[0][0], rounded[1][0])

    def keep(
        self,
        sequence: int,
        exact: KeyValue,
        rounded: KeyValue,
        *,
        resampled: KeyValue | None = None,
        unquantized: KeyValue | None = None,
    ) -> None:
        """Keep the exact keys and values of the next layer, and the errors of the rounded ones."""
        self.expected.caches[sequence].append(exact)
        key, value = compare_key_values(exact, rounded)
        if resampled is not None:
            other_key, other_value = compare_key_values(exact, resampled)
            key, value = larger(key, other_key), larger(value, other_value)
        if unquantized is not None:
            key_cost, value_cost = compare_key_values(exact, unquantized)
            key, value = with_rounding_share(key, key_cost), with_rounding_share(value, value_cost)
        self.noise_floor.by_sequence[sequence].append((key, value))

    @torch.inference_mode()
    def compute(self, keys: Sequence[PositionKey]) -> None:
        """Compute the logits of new positions, and their noise floor, in one pass over the head.

        Raises:
            InputError: a weight holds NaN or infinity, or the source cannot be read.
            Gemma3ExportError: the temporary folder is full.
        """
        keys = self.expected.stored.missing(keys)
        if not keys:
            return
        following = [
            next_ids(self.sequences[sequence], np.array([position]))[0]
            for sequence, position in keys
        ]
        error, again, cost = (LogitComparison(following) for _ in range(3))
        exact_inputs, rounded_inputs = (gather(normed, keys) for normed in self.normed)
        resampled_inputs = gather(self.resampled, keys) if self.resampled else None
        plain_inputs = gather(self.plain.normed[1], keys) if self.plain else None
        self.expected.stored.add(keys)
        for first, weight in head_blocks(self.source, len(keys)):
            self.progress("computing expected logits", first, self.source.config.vocab_size)
            narrow = weight.to(self.dtype)
            with self.enabled():
                exact = self.models[0].head(exact_inputs, weight)
                rounded = self.models[1].head(rounded_inputs, narrow)
            self.expected.stored.write(keys, first, exact)
            error.add(first, exact, rounded)
            if resampled_inputs is not None:
                again.add(first, exact, self.models[1].head(resampled_inputs, narrow))
            if plain_inputs is not None:
                cost.add(first, exact, self.models[1].head(plain_inputs, narrow))
        difference = error.result()
        if resampled_inputs is not None:
            difference = larger(difference, again.result())
        if plain_inputs is not None:
            difference = with_rounding_share(difference, cost.result())
        for index, key in enumerate(keys):
            self.noise_floor.by_position[key] = difference.at(index)


def gather(normed: Sequence[Tensor], keys: Sequence[PositionKey]) -> Tensor:
    """Return the rows [P, D] of ``keys``."""
    return torch.stack([normed[sequence][position] for sequence, position in keys])


class GroundTruth:
    """Expected values and noise floor for one set of weights, shared by any number of runtimes.

    Only one layer's weights are in memory at a time. Keys and values are computed at once; logits
    are computed when they are first needed, for all positions of a request in one pass over the
    head, and stored.

    Args:
        source: the weights that the runtimes should have.
        runtime: a runtime that should have them. It determines the precision, and chooses the
            tokens of the first decode steps.
        options: seed, steps and thresholds.
        tokenizer: adds the text prompts.
        progress: called with the stage and how much of it is done.

    Raises:
        InputError: a weight holds NaN or infinity, or cannot be read.
        Gemma3ExportError: the runtime failed, or the temporary folder is full.
    """

    def __init__(
        self,
        source: WeightSource,
        runtime: Runtime,
        options: VerifyOptions,
        tokenizer: Tokenizer | None = None,
        progress: Progress = ignore_progress,
    ) -> None:
        self.source = source
        self.config = source.config
        self.dtype = noise_floor_dtype(runtime.info)
        half = HalfPrecision.of_runtime(runtime.info)
        self.has_wide_residual = half is not None and not half.holds_residual
        self.options = options
        self.tokenizer = tokenizer
        self.progress = progress
        self.sequences = sequences_for(source.config, options, tokenizer)
        self.sequences[0] = with_greedy_tokens(
            runtime,
            self.sequences[0],
            decode_start(source.config, options),
            min(options.greedy_steps, options.decode_steps),
        )
        if not self.config.tie_word_embeddings:  # the head is checked when it is used
            for chunk in source.chunks(EMBEDDING):
                check_finite(EMBEDDING, chunk)
        plain, shipped = self._run_layers()
        self.expected, self.noise_floor = shipped.expected, shipped.noise_floor
        # Of a quantized graph that multiplies in floating point; see rounding.py.
        has_both = plain is not shipped
        self.float_expected = plain.expected if has_both else None
        self.float_noise_floor = plain.noise_floor if has_both else None

    @classmethod
    def for_runtime(
        cls,
        runtime: Runtime,
        source: WeightSource,
        *,
        options: VerifyOptions | None = None,
        tokenizer: Tokenizer | None = None,
        progress: Progress = ignore_progress,
    ) -> GroundTruth:
        """Compute the ground truth in the precision of ``runtime``.

        Raises:
            InputError: see :class:`GroundTruth`.
        """
        return cls(source, runtime, options or VerifyOptions(), tokenizer, progress)

    def pair(
        self, batches: Sequence[TokenSequence], resampled: Sequence[TokenSequence] = ()
    ) -> ReferencePair:
        """Return the reference, exact and rounded, ready to run over ``batches``."""
        return ReferencePair(
            self.source,
            [torch.from_numpy(sequence.ids) for sequence in batches],
            self.dtype,
            has_wide_residual=self.has_wide_residual,
            resampled=[torch.from_numpy(sequence.ids) for sequence in resampled],
        )

    def prepare(self, positions: Mapping[int, Iterable[int]]) -> None:
        """Compute the logits of these positions of each sequence in one pass over the head.

        Raises:
            InputError: see :class:`GroundTruth`.
        """
        self.expected.compute(
            [(sequence, position) for sequence in positions for position in positions[sequence]]
        )

    @torch.inference_mode()
    def _run_layers(self) -> tuple[Arithmetic, Arithmetic]:
        """Run all layers; return the arithmetic with float activations and that of the kernels."""
        sequences, has_both = self.sequences, bool(self.source.activation_blocks)
        resamples = self.dtype == torch.float32 and not has_both  # see noise_floor.py
        pair = self.pair(
            [*sequences, *sequences] if has_both else sequences, sequences if resamples else ()
        )
        plain = Arithmetic(self.source, sequences, pair, None, self.progress)
        shipped = plain
        if has_both:
            shipped = Arithmetic(self.source, sequences, pair, plain, self.progress)
        count, resampled = len(sequences), None
        done, total = 0, self.config.num_hidden_layers * sum(len(item.ids) for item in sequences)
        for _ in pair.layers():
            for index, sequence in enumerate(sequences):
                self.progress(STAGE, done, total)
                exact, rounded = plain.step(pair, index)
                if resamples:
                    key, value = pair.rounded.step(index + count)[1]
                    resampled = key[0], value[0]
                plain.keep(index, exact, rounded, resampled=resampled)
                if has_both:
                    found = shipped.step(pair, index + count)
                    shipped.keep(index, *found, unquantized=rounded)
                done += len(sequence.ids)
        self.progress(STAGE, done, total)
        exact_states, rounded_states = pair.normed()
        plain.normed = exact_states[:count], rounded_states[:count]
        if resamples:
            plain.resampled = rounded_states[count:]
        else:
            shipped.normed = exact_states[-count:], rounded_states[-count:]
        return plain, shipped
