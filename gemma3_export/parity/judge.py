"""Turns what a case saw into metrics and a verdict.

The rule (gate A): an error may be ``factor`` times the noise floor, the reference's own error in
the runtime's precision at the same places. Two correct implementations differ in the order of their
sums, so their errors have the same size but not the same value. Measured: 1.8 is the largest ratio
of 54 correct tiny runtimes (three shapes, six seeds, three backends), 3.2 that of the real 270M;
the subtlest of 24 real defects (GELU without its tanh form) gives 600. ``factor`` 8 leaves room on
both sides. The divergence is quadratic in the error, so its factor is squared.

A tiny guard keeps the rule sensible where the floor is zero: two units in the last place of the
largest expected number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from gemma3_export.parity.cases import Case
from gemma3_export.parity.differences import (
    LogitDifference,
    TensorDifference,
    compare_logits,
    compare_tensors,
)
from gemma3_export.parity.expected import Truth
from gemma3_export.parity.noise_floor import NoiseFloor, next_ids
from gemma3_export.parity.report.model import CaseResult, LayerResult, MetricResult, PointResult
from gemma3_export.parity.sequences import CacheRead, Observation, Seen

__all__ = ["Limits", "SeenLogits", "judge_case"]

GUARD_ULPS = 2.0
KLD_GUARD = 1e-13  # nats; what cancellation leaves of zero in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How a limit follows from a floor."""

    factor: float
    epsilon: float  # of the runtime's precision

    def error(self, floor: float, scale: float) -> float:
        """Largest error allowed where the floor is ``floor`` and numbers are up to ``scale``."""
        return self.factor * floor + GUARD_ULPS * self.epsilon * scale

    def divergence(self, floor: float, scale: float) -> float:
        """Largest mean divergence allowed."""
        guard = (GUARD_ULPS * self.epsilon * scale) ** 2
        return self.factor**2 * floor + guard + KLD_GUARD


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenLogits:
    """One observation, compared."""

    observation: Observation
    found: LogitDifference
    floor: LogitDifference


@dataclass(slots=True)
class Collected:
    """Everything a case saw, compared."""

    logits: list[SeenLogits] = field(default_factory=list)
    # (layer, kind) -> (found, floor, first position) of each cache read
    caches: dict[tuple[int, str], list[tuple[TensorDifference, TensorDifference, int]]] = field(
        default_factory=dict
    )


def judge_case(
    case: Case, seen: Iterable[Seen], truth: Truth, floor: NoiseFloor, limits: Limits
) -> tuple[CaseResult, list[SeenLogits]]:
    """Compare everything that a case saw, as it comes in."""
    collected = Collected()
    for item in seen:
        if isinstance(item, Observation):
            collected.logits.append(compare_observation(item, truth, floor))
        else:
            compare_cache(item, truth, floor, collected)
    layers = tuple(
        judge_layer(layer, kind, parts, limits)
        for (layer, kind), parts in sorted(collected.caches.items())
    )
    found = LogitDifference.join([part.found for part in collected.logits])
    expected = LogitDifference.join([part.floor for part in collected.logits])
    metrics = [*logit_metrics(found, expected, limits), *cache_metrics(layers)]
    tolerance = next(metric.limit for metric in metrics if metric.name == "logits_max_abs")
    is_tie = found.margin <= 2 * tolerance  # both of the two best may move by the tolerance
    flips = int((~found.is_same_top1 & ~is_tie).sum())
    metrics.append(
        MetricResult(name="greedy_flips", value=float(flips), limit=0.0, passed=flips == 0)
    )
    result = CaseResult(
        name=case.name,
        title=case.title,
        is_text=case.is_text,
        passed=all(metric.passed for metric in metrics),
        positions=len(found.max_abs),
        steps=1 + max(part.observation.step for part in collected.logits),
        metrics=tuple(metrics),
        flips=flips,
        ties=int((~found.is_same_top1 & is_tie).sum()),
        points=tuple(points(collected.logits, tolerance, floor)),
        layers=layers,
    )
    return result, collected.logits


def compare_observation(item: Observation, truth: Truth, floor: NoiseFloor) -> SeenLogits:
    """Logits of one step against truth and floor."""
    found = compare_logits(
        truth.logits(item.sequence, item.positions),
        torch.from_numpy(item.logits),
        next_ids(floor.sequences[item.sequence], item.positions),
    )
    return SeenLogits(
        observation=item, found=found, floor=floor.logits(item.sequence, item.positions)
    )


def compare_cache(item: CacheRead, truth: Truth, floor: NoiseFloor, into: Collected) -> None:
    """Keys and values of every layer of one row against truth and floor.

    A sliding layer's cache may have let go of tokens that no query will see again.
    """
    floors = floor.caches(item.sequence)
    for layer, expected in enumerate(truth.key_values(item.sequence)):
        for kind, index in (("key", 0), ("value", 1)):
            tensor = torch.from_numpy(item.layers[layer][index]).transpose(0, 1)  # [S, K, H]
            first = item.length - max(tensor.shape[0], item.least[layer])
            wanted = expected[index].transpose(0, 1)[first : item.length]
            noise = floors[layer][index]
            noise = TensorDifference(
                noise.max_abs[first : item.length],
                noise.mean_square[first : item.length],
                noise.scale,
            )
            if tensor.shape == wanted.shape and tensor.shape[0] > 0:
                found = compare_tensors(wanted, tensor)
            else:  # too many or too few tokens: nothing is where it should be
                far = np.full(max(1, item.length), np.inf)
                found = TensorDifference(far, far, noise.scale)
                first = 0
            into.caches.setdefault((layer, kind), []).append((found, noise, first))


def judge_layer(
    layer: int,
    kind: str,
    parts: list[tuple[TensorDifference, TensorDifference, int]],
    limits: Limits,
) -> LayerResult:
    """One layer's keys or values over all cache reads of a case."""
    floor = max(float(noise.max_abs.max()) for _, noise, _ in parts)
    scale = max(noise.scale for _, noise, _ in parts)
    limit = limits.error(floor, scale)
    rms = root_mean(np.concatenate([found.mean_square for found, _, _ in parts]))
    floor_rms = root_mean(np.concatenate([noise.mean_square for _, noise, _ in parts]))
    limit_rms = limits.error(floor_rms, scale)
    bad = [
        first + int(np.argmax(found.max_abs > limit))
        for found, _, first in parts
        if (found.max_abs > limit).any()
    ]
    return LayerResult(
        layer=layer,
        kind=kind,
        max_abs=max(float(found.max_abs.max()) for found, _, _ in parts),
        rms=rms,
        noise_floor=floor,
        noise_floor_rms=floor_rms,
        limit=limit,
        limit_rms=limit_rms,
        passed=not bad and rms <= limit_rms < math.inf,
        first_bad_position=min(bad, default=None),
    )


def logit_metrics(
    found: LogitDifference, floor: LogitDifference, limits: Limits
) -> list[MetricResult]:
    """Largest and mean error, divergence, and that all numbers are numbers."""
    scale = float(floor.scale.max())
    worst, noise = float(found.max_abs.max()), float(floor.max_abs.max())
    rms, noise_rms = root_mean(found.mean_square), root_mean(floor.mean_square)
    kld, noise_kld = float(found.kld.mean()), float(floor.kld.mean())
    bad = int(np.isinf(found.max_abs).sum())
    return [
        MetricResult(name="not_finite", value=float(bad), limit=0.0, passed=bad == 0),
        at_most("logits_max_abs", worst, noise, limits.error(noise, scale)),
        at_most("logits_rms", rms, noise_rms, limits.error(noise_rms, scale)),
        at_most("logits_mean_kld", kld, noise_kld, limits.divergence(noise_kld, scale)),
    ]


def cache_metrics(layers: tuple[LayerResult, ...]) -> list[MetricResult]:
    """The layer that comes closest to its limit, or goes furthest beyond it, decides."""
    metrics = []
    for kind in ("key", "value"):
        own = [layer for layer in layers if layer.kind == kind]
        if not own:
            continue
        worst = max(own, key=lambda layer: layer.max_abs / layer.limit)
        mean = max(own, key=lambda layer: layer.rms / layer.limit_rms)
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


def at_most(name: str, value: float, floor: float, limit: float, where: str = "") -> MetricResult:
    """A metric with a floor and an upper limit; a floor that is not finite proves nothing."""
    return MetricResult(
        name=name,
        value=value,
        noise_floor=floor,
        limit=limit,
        passed=value <= limit < math.inf,
        where=where,
    )


def points(logits: list[SeenLogits], tolerance: float, floor: NoiseFloor) -> Iterable[PointResult]:
    """Every compared position, in the order of the steps."""
    for part in logits:
        name = floor.sequences[part.observation.sequence].name
        for row, position in enumerate(part.observation.positions.tolist()):
            yield PointResult(
                sequence=name,
                position=position,
                step=part.observation.step,
                max_abs=float(part.found.max_abs[row]),
                noise_floor=float(part.floor.max_abs[row]),
                kld=float(part.found.kld[row]),
                is_same_top1=bool(part.found.is_same_top1[row]),
                is_tie=bool(part.found.margin[row] <= 2 * tolerance),
            )


def root_mean(mean_squares: np.ndarray) -> float:
    """Root of the mean of mean squares."""
    return math.sqrt(float(np.mean(mean_squares)))
