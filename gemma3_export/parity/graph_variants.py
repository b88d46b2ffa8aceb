"""Check other variants of the graph under test: other arithmetic, other caches, or candidates.

The variant that people run gets all cases. The others share its weights and nearly all of its
nodes, so the few cases that feed and read the cache in every way are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemma3_export.parity.candidate_check import with_candidates
from gemma3_export.parity.cases import Case, cases_for
from gemma3_export.parity.ground_truth import GroundTruth
from gemma3_export.parity.judge import Criteria, Limits, judge_cases
from gemma3_export.parity.report.model import CaseResult
from gemma3_export.progress import Progress
from gemma3_export.runtimes.protocol import CacheVariants, Float32MatMul, Runtime

__all__ = [
    "GraphVariant",
    "candidate_variant",
    "float32_matmul_variant",
    "other_cache_variant",
    "run_variant",
]


@dataclass(frozen=True, slots=True)
class GraphVariant:
    """Another variant of the graph under test, and what to judge it by."""

    prefix: str  # of the names of its cases
    description: str
    runtime: Runtime
    cases: Sequence[Case]
    criteria: Criteria


def float32_matmul_variant(
    candidate: Runtime, ground_truth: GroundTruth, limits: Limits
) -> GraphVariant | None:
    """Return a quantized candidate with float32 products, or None if it is not quantized.

    See :mod:`gemma3_export.parity.rounding`.
    """
    expected, noise_floor = ground_truth.float_expected, ground_truth.float_noise_floor
    if expected is None or noise_floor is None or not isinstance(candidate, Float32MatMul):
        return None
    runtime = candidate.with_float32_matmul()
    if runtime is None:
        return None
    options = ground_truth.options
    options = replace(options, decode_steps=min(6, options.decode_steps))
    cases = cases_for(runtime, ground_truth.config, ground_truth.sequences, options)
    return GraphVariant(
        "float",
        "float32 matmul",
        runtime,
        [case for case in cases if case.checks_variants],
        Criteria(expected, noise_floor, limits),
    )


def other_cache_variant(
    candidate: Runtime, ground_truth: GroundTruth, limits: Limits
) -> GraphVariant | None:
    """Return the sibling graph with another kind of cache, or None if there is none."""
    runtime = candidate.with_other_cache() if isinstance(candidate, CacheVariants) else None
    if runtime is None:
        return None
    kind = runtime.info.cache
    assert kind is not None
    return GraphVariant(
        kind,
        f"{kind} caches",
        runtime,
        [case for case in _cases(runtime, ground_truth) if case.checks_variants],
        Criteria(ground_truth.expected, ground_truth.noise_floor, limits),
    )


def candidate_variant(
    candidate: Runtime, ground_truth: GroundTruth, limits: Limits
) -> GraphVariant | None:
    """Return the runtime with selected candidates as logits, or None if it selects none."""
    runtime = with_candidates(candidate)
    if runtime is None:
        return None
    return GraphVariant(
        "candidates",
        "candidates only",
        runtime,
        [case for case in _cases(runtime, ground_truth) if case.checks_candidates],
        Criteria(ground_truth.expected, ground_truth.noise_floor, limits),
    )


def _cases(runtime: Runtime, ground_truth: GroundTruth) -> list[Case]:
    return cases_for(runtime, ground_truth.config, ground_truth.sequences, ground_truth.options)


def run_variant(variant: GraphVariant, progress: Progress) -> list[CaseResult]:
    """Run and judge the cases of a variant."""
    results = []
    judged = judge_cases(
        variant.cases, variant.runtime, variant.criteria, progress, variant.description
    )
    for case, (result, _) in zip(variant.cases, judged, strict=True):
        name, title = f"{variant.prefix}-{case.name}", f"{case.title}, {variant.description}"
        results.append(replace(result, name=name, title=title))
    return results
