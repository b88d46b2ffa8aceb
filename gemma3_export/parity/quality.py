"""Gate B: measure what rounding or quantizing the weights costs, against full precision.

Gate A compares a runtime with the reference with the *same* weights. This gate asks how good those
weights are. For an fp32 bundle both have the same weights, so the gate passes trivially.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from gemma3_export.parity.differences import LogitDifference, compare_logits
from gemma3_export.parity.expected import ExpectedLogits
from gemma3_export.parity.noise_floor import next_ids
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.report.model import GateResult, MetricResult
from gemma3_export.parity.sequences import LogitObservation, TeacherForcing, TokenSequence
from gemma3_export.progress import Progress
from gemma3_export.runtimes.protocol import Runtime

__all__ = ["compare_with_full_precision", "judge_quality", "run_sequences"]

CHUNK = 32  # tokens per step; all their logits are compared


def run_sequences(
    candidate: Runtime,
    full: ExpectedLogits,
    sequences: Sequence[TokenSequence],
    progress: Progress,
) -> list[LogitDifference]:
    """Run the candidate over ``sequences`` and compare every position with full precision."""
    stage = "comparing with full precision"
    differences = []
    done, total = 0, sum(len(sequence.ids) for sequence in sequences)
    for index, sequence in enumerate(sequences):
        feed = TeacherForcing(candidate, sequences, [index])
        while left := len(sequence.ids) - feed.fed[0]:
            progress(stage, done, total)
            count = min(left, CHUNK)
            differences += [
                compare_with_full_precision(item, full, sequences) for item in feed.step(count)
            ]
            done += count
    progress(stage, total, total)
    return differences


def compare_with_full_precision(
    item: LogitObservation, full: ExpectedLogits, sequences: Sequence[TokenSequence]
) -> LogitDifference:
    """Compare the logits of one step with the full-precision model."""
    return compare_logits(
        full.logits(item.sequence, item.positions),
        torch.from_numpy(item.logits),
        next_ids(sequences[item.sequence], item.positions),
    )


def judge_quality(
    differences: Sequence[LogitDifference], options: VerifyOptions, *, knows_full: bool
) -> GateResult:
    """Judge the KL divergence, the greedy agreement and the perplexity by their thresholds.

    Without ``knows_full``, the differences are those from the quantized weights themselves, which
    say nothing about what quantization changed.
    """
    joined = LogitDifference.join(differences)
    kld, top1 = float(joined.kld.mean()), float(joined.is_same_top1.mean())
    known = np.isfinite(joined.nll_expected)
    increase = float((joined.nll[known] - joined.nll_expected[known]).mean()) if known.any() else 0
    ratio = math.exp(min(increase, 700.0)) if math.isfinite(increase) else math.inf
    metrics = (
        MetricResult(
            name="mean_kld",
            value=kld,
            limit=options.max_mean_kld,
            passed=kld <= options.max_mean_kld,
        ),
        MetricResult(
            name="top1_agreement",
            value=top1,
            limit=options.min_top1,
            passed=top1 >= options.min_top1,
            is_minimum=True,
        ),
        MetricResult(
            name="perplexity_ratio",
            value=ratio,
            limit=options.max_perplexity_ratio,
            passed=ratio <= options.max_perplexity_ratio,
        ),
    )
    return GateResult(
        name="quality",
        question="How far are these weights from full precision?"
        if knows_full
        else "How far are the predictions from the reference's with the same quantized weights? To "
        "compare with full precision, pass --weights.",
        passed=all(metric.passed for metric in metrics),
        metrics=metrics,
    )
