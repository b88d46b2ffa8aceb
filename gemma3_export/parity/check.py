"""Run the cases on a runtime and report the result: :func:`verify` and :func:`compare`."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from gemma3_export import __version__
from gemma3_export.errors import InputError
from gemma3_export.parity.activation_range import (
    calibration_sequences,
    measure_ranges,
    range_gate,
)
from gemma3_export.parity.cases import Case, cases_for, needed_positions
from gemma3_export.parity.differences import LogitDifference
from gemma3_export.parity.expected import (
    ExpectedFromRuntime,
    ExpectedValues,
    FullPrecisionLogits,
)
from gemma3_export.parity.graph_variants import (
    GraphVariant,
    candidate_variant,
    float32_matmul_variant,
    other_cache_variant,
    run_variant,
)
from gemma3_export.parity.ground_truth import GroundTruth
from gemma3_export.parity.judge import Criteria, Limits, judge_cases
from gemma3_export.parity.locate import locate
from gemma3_export.parity.options import HalfPrecision, VerifyOptions
from gemma3_export.parity.quality import compare_with_full_precision, judge_quality, run_sequences
from gemma3_export.parity.report.model import (
    CaseResult,
    Divergence,
    GateResult,
    HalfRanges,
    ModelSummary,
    ParityReport,
)
from gemma3_export.parity.sequences import held_out_sequences
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.reference.weights import WeightSource
from gemma3_export.runtimes.onnx.mapped_pages import return_freed_memory
from gemma3_export.runtimes.protocol import ReleasesWeights, Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = ["compare", "verify"]


def verify(
    candidate: Runtime,
    source: WeightSource,
    *,
    options: VerifyOptions | None = None,
    tokenizer: Tokenizer | None = None,
    full_source: WeightSource | None = None,
    ground_truth: GroundTruth | None = None,
    files: Mapping[str, str] | None = None,
    ranges: HalfRanges | None = None,
    progress: Progress | None = None,
    releases_candidate: bool = False,
) -> ParityReport:
    """Check that ``candidate`` computes what the reference computes with the same weights.

    Args:
        candidate: the runtime under test.
        source: the weights that it should have (dequantized, for a quantized bundle).
        options: seed, steps, factor and thresholds.
        tokenizer: adds text prompts; None omits them.
        full_source: full-precision weights for gate B; None if ``source`` is in full precision.
        ground_truth: precomputed; it replaces ``options`` and ``tokenizer``.
        files: SHA-256 of the bundle's files, for the report.
        ranges: the activation range, if it was measured before.
        progress: called with the stage and how much of it is done.
        releases_candidate: free its weights once only its variants, which have weights of their
            own, are left to check. The candidate cannot be used afterwards.

    Raises:
        InputError: the weights hold NaN, or do not have the runtime's shapes.
        Gemma3ExportError: the runtime failed.
    """
    for weights in (source, full_source or source):
        require_same_shapes(candidate, weights)
    return Check(
        candidate=candidate,
        source=source,
        full_source=full_source,
        files=files or {},
        ranges=ranges,
        progress=progress or ignore_progress,
        releases_candidate=releases_candidate,
    ).run(ground_truth, options, tokenizer)


def compare(
    candidate: Runtime,
    baseline: Runtime,
    source: WeightSource,
    *,
    options: VerifyOptions | None = None,
    tokenizer: Tokenizer | None = None,
    ground_truth: GroundTruth | None = None,
    files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Check that two runtimes compute the same results.

    The expected values are the baseline's. The noise floor is still the rounding of the reference
    with the weights of ``source``. Both runtimes round, so the limits are twice as wide.

    Raises:
        InputError: the two runtimes do not have the same model.
        Gemma3ExportError: a runtime failed.
    """
    for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
        ours, theirs = getattr(candidate.config, name), getattr(baseline.config, name)
        if ours != theirs:
            raise InputError(
                f"{name} is {theirs} in the baseline and {ours} in the candidate; compare two "
                "exports of one model"
            )
    if baseline.config.vocab_size < candidate.config.vocab_size:
        raise InputError(
            f"the baseline has {baseline.config.vocab_size} tokens and the candidate "
            f"{candidate.config.vocab_size}; compare two exports of one model"
        )
    require_same_shapes(candidate, source)
    return Check(
        candidate=candidate,
        source=source,
        baseline=baseline,
        files=files or {},
        progress=progress or ignore_progress,
    ).run(ground_truth, options, tokenizer)


def require_same_shapes(candidate: Runtime, source: WeightSource) -> None:
    """Refuse to compare two different models.

    Raises:
        InputError: a weight has different shapes.
    """
    expected, actual = dict(source.config.weight_shapes()), dict(candidate.config.weight_shapes())
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise InputError(
                f"the runtime does not have the model of {source.origin}: {name} is "
                f"{actual.get(name, 'absent')} in the runtime and {expected.get(name, 'absent')} "
                "in the weights; compare a bundle with the weights it was made from"
            )


FindVariant = Callable[[Runtime, GroundTruth, Limits], GraphVariant | None]


@dataclass(kw_only=True, slots=True)
class Check:
    """One parity check: what it compares, and the results so far."""

    candidate: Runtime
    source: WeightSource
    progress: Progress
    baseline: Runtime | None = None  # None: the reference
    full_source: WeightSource | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    ranges: HalfRanges | None = None
    releases_candidate: bool = False
    cases: list[CaseResult] = field(default_factory=list, init=False)
    quality: list[LogitDifference] = field(default_factory=list, init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    def run(
        self,
        ground_truth: GroundTruth | None,
        options: VerifyOptions | None,
        tokenizer: Tokenizer | None,
    ) -> ParityReport:
        """Run every part of the check and return the report."""
        with self._timed("expected values"):
            if ground_truth is None:
                ground_truth = GroundTruth.for_runtime(
                    self.candidate,
                    self.source,
                    options=options,
                    tokenizer=tokenizer,
                    progress=self.progress,
                )
            config, options = ground_truth.config, ground_truth.options
            cases = cases_for(self.candidate, config, ground_truth.sequences, options)
            needed = needed_positions(self.candidate.config, cases, ground_truth.sequences)
            ground_truth.prepare(needed)
            return_freed_memory()
            expected = self._expected(ground_truth, needed)
        factor = options.factor * (1 if self.baseline is None else 2)
        limits = Limits(factor=factor, epsilon=torch.finfo(ground_truth.dtype).eps)
        criteria = Criteria(expected, ground_truth.noise_floor, limits)
        self._run_cases(cases, criteria, ground_truth.tokenizer)
        divergence = None
        if options.locate and not all(case.passed for case in self.cases):
            with self._stage("looking for the first divergence", "locating"):
                divergence = locate(self.candidate, self.cases, ground_truth, limits)
        self._run_variants(ground_truth, limits)
        gates = self._gates(ground_truth)
        return self._report(ground_truth, gates, divergence)

    def _expected(self, ground_truth: GroundTruth, needed: dict[int, set[int]]) -> ExpectedValues:
        if self.baseline is None:
            return ground_truth.expected
        return ExpectedFromRuntime(
            self.baseline, ground_truth.sequences, needed, self.candidate.config.vocab_size
        )

    def _run_cases(
        self, cases: Sequence[Case], criteria: Criteria, tokenizer: Tokenizer | None
    ) -> None:
        """Judge every case, then measure the quality of the weights on text where possible."""
        full, sequences = self.full_source, criteria.noise_floor.sequences
        full_values = None
        if full is not None and tokenizer is None:
            full_values = FullPrecisionLogits(full, sequences, self.progress)
        has_text = any(case.is_text for case in cases)
        started = time.perf_counter()
        judged = judge_cases(cases, self.candidate, criteria, self.progress)
        for case, (result, compared) in zip(cases, judged, strict=True):
            self.cases.append(result)
            if case.is_text or not has_text:
                self.quality += [
                    part.error
                    if full_values is None
                    else compare_with_full_precision(part.observation, full_values, sequences)
                    for part in compared
                ]
            self.seconds[f"case {case.name}"] = time.perf_counter() - started
            started = time.perf_counter()
        if full is not None and tokenizer is not None:
            with self._timed("held-out text"):
                texts = held_out_sequences(tokenizer, self.candidate.config.max_position_embeddings)
                full_values = FullPrecisionLogits(full, texts, self.progress)
                self.quality = run_sequences(self.candidate, full_values, texts, self.progress)

    def _run_variants(self, ground_truth: GroundTruth, limits: Limits) -> None:
        variants = {"candidates": candidate_variant, "other caches": other_cache_variant}
        if self.baseline is not None:
            variants.clear()
        for name, find_variant in (variants | {"float32 matmul": float32_matmul_variant}).items():
            has_own_weights = find_variant is not candidate_variant
            if has_own_weights and self.releases_candidate:
                if isinstance(self.candidate, ReleasesWeights):
                    self.candidate.release()
                return_freed_memory()
            with self._timed(name):
                variant = find_variant(self.candidate, ground_truth, limits)
                if variant is not None:
                    self.cases += run_variant(variant, self.progress)
                del variant

    def _gates(self, ground_truth: GroundTruth) -> tuple[GateResult, ...]:
        implementation = GateResult(
            name="implementation",
            question="Does the runtime compute what the reference computes with the same weights?",
            passed=all(case.passed for case in self.cases),
        )
        knows_full = self.full_source is not None or not self.candidate.info.is_quantized
        quality = judge_quality(self.quality, ground_truth.options, knows_full=knows_full)
        half = HalfPrecision.of_runtime(self.candidate.info)
        if half is not None and self.ranges is None:
            with self._timed("activation range"):
                sequences = calibration_sequences(self.source.config, ground_truth.tokenizer)
                self.ranges = measure_ranges(self.source, sequences, half, self.progress)
        if self.ranges is None:
            return implementation, quality
        return implementation, quality, range_gate(self.ranges)

    def _report(
        self,
        ground_truth: GroundTruth,
        gates: tuple[GateResult, ...],
        divergence: Divergence | None,
    ) -> ParityReport:
        reference: dict[str, object] = {"runtime": "reference", "dtype": "float64"}
        return ParityReport(
            candidate=self.candidate.info.to_json(),
            baseline=reference if self.baseline is None else self.baseline.info.to_json(),
            model=ModelSummary.of(self.source.config),
            source=self.source.fingerprint(),
            files=dict(self.files),
            options=ground_truth.options,
            versions={
                "gemma3-export": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": importlib.metadata.version("numpy"),
            },
            noise_floor_dtype=str(ground_truth.dtype).removeprefix("torch."),
            gates=gates,
            cases=tuple(self.cases),
            divergence=divergence,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            ranges=self.ranges,
            seconds=self.seconds,
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    @contextmanager
    def _stage(self, stage: str, name: str) -> Iterator[None]:
        """Time a part that cannot report its own progress."""
        self.progress(stage, 0, 1)
        with self._timed(name):
            yield
        self.progress(stage, 1, 1)
