"""Check the graph that a bundle may have for prompts: see exporters/onnx/prefill_graph.py.

It has the same matrices in another rounding, and rounds activations in another way. The reference
therefore computes each token as the runtime does: those of a prompt with the weights and the
rounding of that graph, the others with those of the graph for decoding. All caches are compared,
and the logits of the tokens that follow, which attend to them.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.parity.cases import BATCH_STEPS, LONG, SHORT, Case, chunk_size
from gemma3_export.parity.graph_variants import GraphVariant
from gemma3_export.parity.ground_truth import GroundTruth
from gemma3_export.parity.judge import Criteria, Limits
from gemma3_export.parity.prefill_products import PrefillTokens
from gemma3_export.parity.sequences import Observation, TeacherForcing, TokenSequence
from gemma3_export.reference.weights.bundle_weights import OnnxWeights, PrefillWeights
from gemma3_export.runtimes.protocol import CacheVariants, PrefillVariants, Runtime

__all__ = ["PrefillCheck"]

CHUNK = 23  # tokens, at least: a prime number, beyond what runs in the graph for decoding
ROWS = (LONG, *SHORT)


class PrefillCheck:
    """The check of the graphs for prompts of one bundle, one for each kind of cache.

    Expected values are computed once, when they are first needed.

    Args:
        ground_truth: that of the graphs for decoding.
        limits: what errors are judged by.
    """

    def __init__(self, ground_truth: GroundTruth, limits: Limits) -> None:
        self.ground_truth, self.limits = ground_truth, limits
        self.sequences = ground_truth.sequences[: len(ROWS)]
        self.plan = chunks(ground_truth.config, self.sequences)
        self._criteria: Criteria | None = None

    def variant(self, candidate: Runtime, prefix: str = "") -> GraphVariant | None:
        """Return the runtime that uses the graph for prompts, or None if there is none.

        Args:
            candidate: the runtime that does not use it.
            prefix: of the names of its cases.

        Raises:
            InputError: the ground truth is not that of the bundle's own weights.
        """
        if not isinstance(candidate, PrefillVariants):
            return None
        runtime = candidate.with_integer_prefill()
        if runtime is None:
            return None
        assert isinstance(runtime, PrefillVariants)
        positions = [
            token_positions(runtime, counts, len(sequence.ids))
            for counts, sequence in zip(self.plan, self.sequences, strict=True)
        ]
        if not any(part.any() for part in positions):
            return None  # the context is too short for any prompt that would run there
        case = Case(
            "prompts",
            "three prompts in chunks, then decoded together",
            partial(prompts, sequences=self.sequences, plan=self.plan),
        )
        if self._criteria is None:
            self._criteria = self._compute(runtime, positions)
        name, kind = f"{prefix}integers", f"{runtime.info.cache} caches, integer prefill"
        return GraphVariant(name, kind, runtime, [case], self._criteria)

    def other_cache_variant(self, candidate: Runtime) -> GraphVariant | None:
        """Return the runtime that uses the graph for prompts with the other kind of cache."""
        if not isinstance(candidate, PrefillVariants) or not candidate.has_integer_prefill:
            return None  # without opening the other cache's graph
        other = candidate.with_other_cache() if isinstance(candidate, CacheVariants) else None
        return None if other is None else self.variant(other, f"{other.info.cache}-")

    def _compute(self, runtime: Runtime, positions: Sequence[Tensor]) -> Criteria:
        """Return what the results of any of the graphs are judged by."""
        source = self.ground_truth.source
        if not isinstance(source, OnnxWeights):
            raise InputError(
                f"a bundle with a graph for prompts is compared with its own weights, not with "
                f"{source.origin}"
            )
        truth = GroundTruth(
            source,
            runtime,
            self.ground_truth.options,
            progress=self.ground_truth.progress,
            prefill=PrefillTokens(PrefillWeights(source.bundle), positions),
            sequences=self.sequences,
        )
        return Criteria(truth.expected, truth.noise_floor, self.limits)


def chunks(config: Gemma3Config, sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Return the lengths of the chunks in which each sequence is fed, without the last steps."""
    steps = decode_steps(sequences)
    plan = []
    for sequence in sequences:
        length = len(sequence.ids) - steps
        size = max(CHUNK, chunk_size(config, length))
        plan.append([min(size, length - start) for start in range(0, length, size)])
    return plan


def decode_steps(sequences: Sequence[TokenSequence]) -> int:
    """Return how many tokens of each sequence are decoded."""
    return min(BATCH_STEPS, min(len(sequence.ids) for sequence in sequences) - 1)


def token_positions(runtime: PrefillVariants, plan: Sequence[int], length: int) -> Tensor:
    """Return which tokens [T] of a sequence run in the graph for prompts."""
    positions = torch.zeros(length, dtype=torch.bool)
    start = 0
    for count in plan:
        positions[start : start + runtime.prefill_tokens(count, 1)] = True
        start += count
    return positions


def prompts(
    runtime: Runtime, *, sequences: Sequence[TokenSequence], plan: Sequence[Sequence[int]]
) -> Iterator[Observation]:
    """Feed the chunks of each row, then single tokens of all rows together."""
    feed = TeacherForcing(runtime, sequences, range(len(sequences)))
    for row, counts in enumerate(plan):
        for count in counts:
            yield from feed.step(count, keep=1, row=row)
    for _ in range(decode_steps(sequences)):
        yield from feed.step(1)
    yield from feed.read()
