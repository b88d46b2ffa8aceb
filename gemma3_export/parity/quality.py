"""Gate B: what rounding or quantising the weights costs, against full precision.

Gate A holds a runtime to the reference with the *same* weights; this gate asks what those weights
are worth. For an fp32 bundle both are the same weights and the answer is trivial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources

import numpy as np
import torch

from gemma3_export.parity.differences import LogitDifference, compare_logits
from gemma3_export.parity.expected import Truth
from gemma3_export.parity.judge import SeenLogits
from gemma3_export.parity.noise_floor import next_ids
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.report.model import GateResult, MetricResult
from gemma3_export.parity.sequences import TeacherForcing, TokenSequence
from gemma3_export.progress import Progress
from gemma3_export.runtimes.protocol import Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = [
    "held_out_passages",
    "held_out_sequences",
    "judge_quality",
    "measure_quality",
    "requality",
]


def requality(seen: SeenLogits, full: Truth, sequences: Sequence[TokenSequence]) -> LogitDifference:
    """The same observation against the full-precision model."""
    item = seen.observation
    return compare_logits(
        full.logits(item.sequence, item.positions),
        torch.from_numpy(item.logits),
        next_ids(sequences[item.sequence], item.positions),
    )


def judge_quality(differences: Sequence[LogitDifference], options: VerifyOptions) -> GateResult:
    """Divergence, agreement of the greedy choice, and perplexity, against the thresholds."""
    all_of = LogitDifference.join(differences)
    kld, top1 = float(all_of.kld.mean()), float(all_of.is_same_top1.mean())
    known = np.isfinite(all_of.nll_truth)
    lost = float((all_of.nll[known] - all_of.nll_truth[known]).mean()) if known.any() else 0.0
    ratio = math.exp(min(lost, 700.0)) if math.isfinite(lost) else math.inf
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
        question="How far do these weights lie from full precision?",
        passed=all(metric.passed for metric in metrics),
        metrics=metrics,
    )


# Gate B on text: what a quantised export predicts, beside the full-precision model.
#
# The text was written for this project, so no calibration and no training has seen it: prose, code,
# tables, a letter, questions, and nine languages.

CHUNK = 32  # tokens a step; all their logits are compared
SEPARATOR = "\n---\n"


def held_out_passages() -> list[str]:
    """The passages, each 100 to 250 tokens of Gemma's tokenizer."""
    text = resources.files(__package__).joinpath("held_out.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n").split(SEPARATOR)


def held_out_sequences(tokenizer: Tokenizer, limit: int) -> list[TokenSequence]:
    """The passages as tokens, each cut at ``limit``."""
    return [
        TokenSequence(f"held out {index}", np.array(tokenizer.encode(text)[:limit], np.int64), True)
        for index, text in enumerate(held_out_passages())
    ]


def measure_quality(
    candidate: Runtime, full: Truth, sequences: list[TokenSequence], progress: Progress
) -> LogitDifference:
    """Every position of ``sequences`` on the candidate, against full precision."""
    parts = []
    for index, sequence in enumerate(sequences):
        progress("comparing with full precision", index, len(sequences))
        walk = TeacherForcing(candidate, sequences, [index])
        while left := len(sequence.ids) - walk.fed[0]:
            for seen in walk.step(min(left, CHUNK)):
                expected = full.logits(index, seen.positions)
                following = next_ids(sequence, seen.positions)
                parts.append(compare_logits(expected, torch.from_numpy(seen.logits), following))
    progress("comparing with full precision", len(sequences), len(sequences))
    return LogitDifference.join(parts)
