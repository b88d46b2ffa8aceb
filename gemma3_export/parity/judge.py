"""Turn the observations of a case into metrics and a verdict.

The rule (gate A): an error may be ``factor`` times the noise floor, which is the reference's own
error in the runtime's precision at the same positions. Two correct implementations add in different
orders, so their errors have the same magnitude but not the same value. Measured: the largest ratio
of 54 correct tiny runtimes (three shapes, six seeds, three backends) is 1.8, and that of the real
270M is 5.9; the subtlest of 24 real defects (GELU without the tanh approximation) reaches 600. A
``factor`` of 8 leaves room on both sides. The KL divergence is quadratic in the error, so its
factor is squared.

A small guard covers positions where the noise floor is zero: two units in the last place of the
largest expected number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gemma3_export.parity.cases import Case, needed_positions, work_of
from gemma3_export.parity.differences import (
    LogitDifference,
    TensorDifference,
    compare_logits,
    compare_tensors,
)
from gemma3_export.parity.expected import ExpectedValues
from gemma3_export.parity.noise_floor import NoiseFloor, next_ids
from gemma3_export.parity.report.model import CaseResult, LayerResult, MetricResult, PointResult
from gemma3_export.parity.sequences import CacheObservation, LogitObservation
from gemma3_export.progress import Progress
from gemma3_export.runtimes.protocol import Runtime

__all__ = ["ComparedLogits", "Criteria", "Limits", "judge_cases"]

GUARD_ULPS = 2.0
KLD_GUARD = 1e-13  # nats; cancellation leaves this much of zero in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limit on an error as a function of the noise floor."""

    factor: float
    epsilon: float  # machine epsilon of the runtime's precision

    def error(self, noise_floor: float, scale: float) -> float:
        """Return the largest allowed error of numbers that are ``scale`` at most."""
        return self.factor * noise_floor + GUARD_ULPS * self.epsilon * scale

    def divergence(self, noise_floor: float, scale: float) -> float:
        """Return the largest allowed mean KL divergence, in nats."""
        guard = (GUARD_ULPS * self.epsilon * scale) ** 2
        return self.factor**2 * noise_floor + guard + KLD_GUARD


@dataclass(frozen=True, slots=True)
class Criteria:
    """Everything that a runtime's results are judged by."""

    expected: ExpectedValues
    noise_floor: NoiseFloor
    limits: Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedLogits:
    """One observation and its differences from the expected logits."""

    observation: LogitObservation
    error: LogitDifference
    noise_floor: LogitDifference


@dataclass(frozen=True, slots=True)
class ComparedTensor:
    """Keys or values of one layer, from one read of a cache."""

    error: TensorDifference
    noise_floor: TensorDifference
    first: int  # position of the first compared token


@dataclass(slots=True)
class Comparisons:
    """All comparisons of one case."""

    logits: list[ComparedLogits] = field(default_factory=list)
    caches: dict[tuple[int, str], list[ComparedTensor]] = field(default_factory=dict)


def judge_cases(
    cases: Sequence[Case],
    runtime: Runtime,
    criteria: Criteria,
    progress: Progress,
    description: str = "",
) -> Iterator[tuple[CaseResult, list[ComparedLogits]]]:
    """Run the cases and yield the result of each.

    Args:
        cases: the cases to run.
        runtime: the runtime under test.
        criteria: what its results are judged by.
        progress: called with the stage and how much of the work of all cases is done.
        description: what distinguishes the runtime, for the stage.
    """
    sequences = criteria.noise_floor.sequences
    plans = [work_of(runtime.config, case, sequences) for case in cases]
    done, total = 0, sum(plan[-1] for plan in plans)
    for case, plan in zip(cases, plans, strict=True):
        stage = f"comparing {case.name}{description and ', '}{description}"

        def advance(
            observations: int, stage: str = stage, plan: list[int] = plan, before: int = done
        ) -> None:
            step = min(observations, len(plan)) - 1
            progress(stage, before + (plan[step] if observations else 0), total)

        yield judge_case(case, runtime, criteria, advance)
        done += plan[-1]
    progress("comparing", total, total)


def judge_case(
    case: Case, runtime: Runtime, criteria: Criteria, advance: Callable[[int], None]
) -> tuple[CaseResult, list[ComparedLogits]]:
    """Run a case and compare its observations as they arrive; ``advance`` gets their number."""
    advance(0)
    _prefetch_noise_floor(case, runtime, criteria.noise_floor)
    comparisons = Comparisons()
    for number, item in enumerate(case.run(runtime), start=1):
        advance(number)
        if isinstance(item, LogitObservation):
            comparisons.logits.append(compare_observation(item, criteria))
        else:
            compare_cache(item, criteria, comparisons)
    layers = tuple(
        judge_layer(layer, kind, parts, criteria.limits)
        for (layer, kind), parts in sorted(comparisons.caches.items())
    )
    error = LogitDifference.join([part.error for part in comparisons.logits])
    noise_floor = LogitDifference.join([part.noise_floor for part in comparisons.logits])
    metrics = [*logit_metrics(error, noise_floor, criteria.limits), *cache_metrics(layers)]
    tolerance = next(metric.limit for metric in metrics if metric.name == "logits_max_abs")
    is_tie = error.margin <= 2 * tolerance  # each of the top two may move by the tolerance
    flips = int((~error.is_same_top1 & ~is_tie).sum())
    metrics.append(
        MetricResult(name="greedy_flips", value=float(flips), limit=0.0, passed=flips == 0)
    )
    result = CaseResult(
        name=case.name,
        title=case.title,
        is_text=case.is_text,
        passed=all(metric.passed for metric in metrics),
        positions=len(error.max_abs),
        steps=1 + max(part.observation.step for part in comparisons.logits),
        metrics=tuple(metrics),
        flips=flips,
        ties=int((~error.is_same_top1 & is_tie).sum()),
        points=tuple(points(comparisons.logits, tolerance, criteria.noise_floor)),
        layers=layers,
    )
    return result, comparisons.logits


def _prefetch_noise_floor(case: Case, runtime: Runtime, noise_floor: NoiseFloor) -> None:
    """Compute a case's noise floor in blocks; single positions would each read the whole head."""
    needed = needed_positions(runtime.config, [case], noise_floor.sequences)
    for sequence, positions in needed.items():
        noise_floor.logits(sequence, np.array(sorted(positions)))


def compare_observation(item: LogitObservation, criteria: Criteria) -> ComparedLogits:
    """Compare the logits of one step."""
    noise_floor = criteria.noise_floor
    error = compare_logits(
        criteria.expected.logits(item.sequence, item.positions),
        torch.from_numpy(item.logits),
        next_ids(noise_floor.sequences[item.sequence], item.positions),
    )
    return ComparedLogits(
        observation=item,
        error=error,
        noise_floor=noise_floor.logits(item.sequence, item.positions),
    )


def compare_cache(item: CacheObservation, criteria: Criteria, into: Comparisons) -> None:
    """Compare the keys and values of every layer of one row.

    The cache of a sliding layer may have dropped tokens that no later query can attend to.
    """
    noise_floors = criteria.noise_floor.caches(item.sequence)
    for layer, key_value in enumerate(criteria.expected.key_values(item.sequence)):
        for kind, index in (("key", 0), ("value", 1)):
            actual = torch.from_numpy(item.layers[layer][index]).transpose(0, 1)  # [S, K, H]
            first = item.length - max(actual.shape[0], item.required[layer])
            expected = key_value[index].transpose(0, 1)[first : item.length]
            whole = noise_floors[layer][index]
            noise_floor = TensorDifference(
                whole.max_abs[first : item.length],
                whole.mean_square[first : item.length],
                whole.scale,
            )
            if actual.shape == expected.shape and actual.shape[0] > 0:
                error = compare_tensors(expected, actual)
            else:  # too many or too few tokens: no position can be trusted
                infinite = np.full(max(1, item.length), np.inf)
                error = TensorDifference(infinite, infinite, whole.scale)
                first = 0
            into.caches.setdefault((layer, kind), []).append(
                ComparedTensor(error, noise_floor, first)
            )


def judge_layer(layer: int, kind: str, parts: list[ComparedTensor], limits: Limits) -> LayerResult:
    """Judge one layer's keys or values over all cache reads of a case."""
    noise_floor = max(float(part.noise_floor.max_abs.max()) for part in parts)
    scale = max(part.noise_floor.scale for part in parts)
    limit = limits.error(noise_floor, scale)
    rms = root_mean([part.error.mean_square for part in parts])
    noise_floor_rms = root_mean([part.noise_floor.mean_square for part in parts])
    limit_rms = limits.error(noise_floor_rms, scale)
    bad = [
        part.first + int(np.argmax(part.error.max_abs > limit))
        for part in parts
        if (part.error.max_abs > limit).any()
    ]
    return LayerResult(
        layer=layer,
        kind=kind,
        max_abs=max(float(part.error.max_abs.max()) for part in parts),
        rms=rms,
        noise_floor=noise_floor,
        noise_floor_rms=noise_floor_rms,
        limit=limit,
        limit_rms=limit_rms,
        passed=not bad and rms <= limit_rms < math.inf,
        first_bad_position=min(bad, default=None),
    )


def logit_metrics(
    error: LogitDifference, noise_floor: LogitDifference, limits: Limits
) -> list[MetricResult]:
    """Return the maximum and RMS error, the mean KL divergence, and the non-finite positions."""
    scale = float(noise_floor.scale.max())
    worst, worst_floor = float(error.max_abs.max()), float(noise_floor.max_abs.max())
    rms, rms_floor = root_mean([error.mean_square]), root_mean([noise_floor.mean_square])
    kld, kld_floor = float(error.kld.mean()), float(noise_floor.kld.mean())
    bad = int(np.isinf(error.max_abs).sum())
    return [
        MetricResult(name="not_finite", value=float(bad), limit=0.0, passed=bad == 0),
        at_most("logits_max_abs", worst, worst_floor, limits.error(worst_floor, scale)),
        at_most("logits_rms", rms, rms_floor, limits.error(rms_floor, scale)),
        at_most("logits_mean_kld", kld, kld_floor, limits.divergence(kld_floor, scale)),
    ]


def cache_metrics(layers: tuple[LayerResult, ...]) -> list[MetricResult]:
    """Return the metrics of the layers that are closest to their limits, or furthest beyond."""
    metrics = []
    for kind in ("key", "value"):
        own = [layer for layer in layers if layer.kind == kind]
        if not own:
            continue
        worst = max(own, key=lambda layer: layer.share_of_limit)
        mean = max(own, key=lambda layer: layer.rms_share_of_limit)
        metrics += [
            at_most(
                f"{kind}_max_abs",
                worst.max_abs,
                worst.noise_floor,
                worst.limit,
                where=f"layer {worst.layer}",
            ),
            at_most(
                f"{kind}_rms",
                mean.rms,
                mean.noise_floor_rms,
                mean.limit_rms,
                where=f"layer {mean.layer}",
            ),
        ]
    return metrics


def at_most(
    name: str, value: float, noise_floor: float, limit: float, where: str = ""
) -> MetricResult:
    """Return a metric with an upper limit; it fails if the limit is not finite."""
    return MetricResult(
        name=name,
        value=value,
        noise_floor=noise_floor,
        limit=limit,
        passed=value <= limit < math.inf,
        where=where,
    )


def points(
    logits: list[ComparedLogits], tolerance: float, noise_floor: NoiseFloor
) -> Iterator[PointResult]:
    """Yield every compared position, in the order of the steps."""
    for part in logits:
        name = noise_floor.sequences[part.observation.sequence].name
        for row, position in enumerate(part.observation.positions.tolist()):
            yield PointResult(
                sequence=name,
                position=position,
                step=part.observation.step,
                max_abs=float(part.error.max_abs[row]),
                noise_floor=float(part.noise_floor.max_abs[row]),
                kld=float(part.error.kld[row]),
                is_same_top1=bool(part.error.is_same_top1[row]),
                is_tie=bool(part.error.margin[row] <= 2 * tolerance),
            )


def root_mean(mean_squares: list[np.ndarray]) -> float:
    """Return the root of the mean of mean squares."""
    return math.sqrt(float(np.mean(np.concatenate(mean_squares))))
