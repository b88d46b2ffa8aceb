"""Run the cases on a runtime and hold them against the truth: :func:`verify`, :func:`compare`."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from gemma3_export.parity.expected import ReferenceTruth, RuntimeTruth, Truth
from gemma3_export.parity.graph_variants import (
    prepare_floor,
    run_chosen_cases,
    run_float_cases,
    run_sibling_cases,
)
from gemma3_export.parity.judge import Limits, SeenLogits, judge_case
from gemma3_export.parity.locate import locate
from gemma3_export.parity.noise_floor import Yardstick
from gemma3_export.parity.options import HalfPrecision, VerifyOptions, floor_dtype
from gemma3_export.parity.quality import (
    held_out_sequences,
    judge_quality,
    measure_quality,
    requality,
)
from gemma3_export.parity.report.model import (
    CaseResult,
    Divergence,
    GateResult,
    HalfRanges,
    ParityReport,
)
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.weights import WeightSource
from gemma3_export.runtimes.protocol import Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = ["compare", "make_yardstick", "verify"]


@dataclass(slots=True)
class Outcome:
    """What running all cases gave."""

    cases: list[CaseResult]
    quality: list[LogitDifference]
    seconds: dict[str, float]


def make_yardstick(
    runtime: Runtime,
    source: WeightSource,
    *,
    options: VerifyOptions | None = None,
    tokenizer: Tokenizer | None = None,
) -> Yardstick:
    """Truth and floor in the precision of ``runtime``, to hold several runtimes against it.

    Raises:
        InputError: see :class:`gemma3_export.parity.noise_floor.Yardstick`.
    """
    half = HalfPrecision.of_runtime(runtime.info)
    return Yardstick(
        source,
        floor_dtype(runtime.info),
        options or VerifyOptions(),
        tokenizer,
        has_wide_residual=half is not None and not half.holds_residual,
    )


def verify(
    candidate: Runtime,
    source: WeightSource,
    *,
    options: VerifyOptions | None = None,
    tokenizer: Tokenizer | None = None,
    full_source: WeightSource | None = None,
    yardstick: Yardstick | None = None,
    files: Mapping[str, str] | None = None,
    ranges: HalfRanges | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Whether ``candidate`` computes what the reference computes with the weights of ``source``.

    Args:
        candidate: the runtime under test.
        source: the weights it should have (dequantised, for a quantised bundle).
        options: seed, steps, factor and thresholds.
        tokenizer: adds text prompts; None leaves them out.
        full_source: full-precision weights for gate B; None means that ``source`` is.
        yardstick: a prepared truth, which makes ``options`` and ``tokenizer`` unnecessary.
        files: SHA-256 of the bundle's files, for the report.
        ranges: the activation range, where it is known already.
        progress: told the stage, and how far it is.

    Raises:
        InputError: the weights hold NaN, or do not have the runtime's shapes.
        Gemma3ExportError: the runtime failed.
    """
    return _check(
        candidate, None, source, options, tokenizer, full_source, yardstick, files, ranges, progress
    )


def compare(
    candidate: Runtime,
    baseline: Runtime,
    source: WeightSource,
    *,
    options: VerifyOptions | None = None,
    tokenizer: Tokenizer | None = None,
    yardstick: Yardstick | None = None,
    files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Whether two runtimes compute the same.

    Expected values are the baseline's; the floor is still the reference's rounding with the
    weights of ``source``. As both runtimes bring their own rounding, limits are twice as wide.

    Raises:
        InputError: the two are not the same model.
        Gemma3ExportError: a runtime failed.
    """
    if baseline.config.num_hidden_layers != candidate.config.num_hidden_layers:
        raise InputError(
            f"the baseline has {baseline.config.num_hidden_layers} layers and the candidate "
            f"{candidate.config.num_hidden_layers}; compare two exports of one model"
        )
    return _check(
        candidate, baseline, source, options, tokenizer, None, yardstick, files, None, progress
    )


def _check(
    candidate: Runtime,
    baseline: Runtime | None,
    source: WeightSource,
    options: VerifyOptions | None,
    tokenizer: Tokenizer | None,
    full_source: WeightSource | None,
    yardstick: Yardstick | None,
    files: Mapping[str, str] | None,
    ranges: HalfRanges | None,
    progress: Progress | None,
) -> ParityReport:
    report = progress or ignore_progress
    require_same_shapes(candidate, source)
    started = time.perf_counter()
    report("computing the truth", 0, 1)
    if yardstick is None:
        yardstick = make_yardstick(candidate, source, options=options, tokenizer=tokenizer)
    options = yardstick.options
    cases = cases_for(candidate, yardstick.config, yardstick.sequences, options)
    truth: Truth = yardstick.truth
    if baseline is not None:
        needed = needed_positions(candidate.config, cases, yardstick.sequences)
        truth = RuntimeTruth(baseline, yardstick.sequences, needed)
    report("computing the truth", 1, 1)
    seconds = {"truth": time.perf_counter() - started}
    factor = options.factor * (1 if baseline is None else 2)
    limits = Limits(factor=factor, epsilon=torch.finfo(yardstick.dtype).eps)
    full = None if full_source is None else load_reference(full_source)
    by_text = full is not None and yardstick.tokenizer is not None
    outcome = run_cases(
        candidate, cases, truth, yardstick, limits, None if by_text else full, report
    )
    if full is not None and yardstick.tokenizer is not None:
        started = time.perf_counter()
        outcome.quality = held_out_quality(candidate, full, yardstick.tokenizer, report)
        seconds["held-out text"] = time.perf_counter() - started
    divergence = None
    if options.locate and not all(case.passed for case in outcome.cases):
        report("looking for the first diverging layer", 0, 1)
        started = time.perf_counter()
        divergence = locate(candidate, outcome.cases, yardstick, limits)
        seconds["locating"] = time.perf_counter() - started
        report("looking for the first diverging layer", 1, 1)
    started = time.perf_counter()
    outcome.cases += run_float_cases(candidate, yardstick, limits, report)
    seconds["float products"] = time.perf_counter() - started
    if baseline is None:
        started = time.perf_counter()
        outcome.cases += run_sibling_cases(candidate, yardstick, limits, report)
        seconds["other caches"] = time.perf_counter() - started
        started = time.perf_counter()
        outcome.cases += run_chosen_cases(candidate, yardstick, limits, report)
        seconds["candidates"] = time.perf_counter() - started
    gates = [implementation_gate(outcome.cases), judge_quality(outcome.quality, options)]
    half = HalfPrecision.of_runtime(candidate.info)
    if half is not None and ranges is None:
        started = time.perf_counter()
        sequences = calibration_sequences(source.config, yardstick.tokenizer)
        ranges = measure_ranges(source, sequences, half, report)
        seconds["activation range"] = time.perf_counter() - started
    if ranges is not None:
        gates.append(range_gate(ranges))
    return assemble(
        candidate, baseline, source, yardstick, gates, outcome, divergence, files, ranges, seconds
    )


def require_same_shapes(candidate: Runtime, source: WeightSource) -> None:
    """Refuse to compare two different models.

    Raises:
        InputError: naming what differs.
    """
    wanted, found = dict(source.config.weight_shapes()), dict(candidate.config.weight_shapes())
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"the runtime is not the model of {source.origin}: {name} is "
                f"{found.get(name, 'absent')} there and {wanted.get(name, 'absent')} in the "
                "weights; compare a bundle with the weights that it was made from"
            )


def run_cases(
    candidate: Runtime,
    cases: Sequence[Case],
    truth: Truth,
    yardstick: Yardstick,
    limits: Limits,
    full_model: Gemma3 | None,
    progress: Progress,
) -> Outcome:
    """Every case on the candidate, judged."""
    full = None if full_model is None else ReferenceTruth(full_model, yardstick.sequences)
    outcome = Outcome([], [], {})
    has_text = any(case.is_text for case in cases)
    for index, case in enumerate(cases):
        progress(f"comparing {case.name}", index, len(cases))
        started = time.perf_counter()
        prepare_floor(case, yardstick.config, yardstick.floor)
        result, seen = judge_case(case, case.run(candidate), truth, yardstick.floor, limits)
        outcome.cases.append(result)
        if case.is_text or not has_text:  # quality on text, where there is text
            outcome.quality += [quality_of(part, full, yardstick) for part in seen]
        outcome.seconds[case.name] = time.perf_counter() - started
    progress("comparing", len(cases), len(cases))
    return outcome


def held_out_quality(
    candidate: Runtime, full: Gemma3, tokenizer: Tokenizer, progress: Progress
) -> list[LogitDifference]:
    """Gate B on text that neither calibration nor the cases have seen."""
    sequences = held_out_sequences(tokenizer, candidate.config.max_position_embeddings)
    return [measure_quality(candidate, ReferenceTruth(full, sequences), sequences, progress)]


def quality_of(part: SeenLogits, full: Truth | None, yardstick: Yardstick) -> LogitDifference:
    """Against full precision, which may be what gate A has compared with already."""
    if full is None:
        return part.found
    return requality(part, full, yardstick.sequences)


def implementation_gate(cases: Sequence[CaseResult]) -> GateResult:
    """Gate A: all cases."""
    return GateResult(
        name="implementation",
        question="Does the runtime compute what the reference computes with the same weights?",
        passed=all(case.passed for case in cases),
    )


def assemble(
    candidate: Runtime,
    baseline: Runtime | None,
    source: WeightSource,
    yardstick: Yardstick,
    gates: Sequence[GateResult],
    outcome: Outcome,
    divergence: Divergence | None,
    files: Mapping[str, str] | None,
    ranges: HalfRanges | None,
    seconds: dict[str, float],
) -> ParityReport:
    """The report of everything above."""
    config = source.config
    reference: dict[str, object] = {"runtime": "reference", "dtype": "float64"}
    return ParityReport(
        candidate=candidate.info.to_json(),
        baseline=reference if baseline is None else baseline.info.to_json(),
        model={
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
            "num_parameters": config.num_parameters,
        },
        source=source.fingerprint(),
        files=dict(files or {}),
        options=asdict(yardstick.options),
        versions={
            "gemma3-export": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": importlib.metadata.version("numpy"),
        },
        noise_floor_dtype=str(yardstick.dtype).removeprefix("torch."),
        gates=tuple(gates),
        cases=tuple(outcome.cases),
        divergence=divergence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        ranges=ranges,
        seconds=seconds | {f"case {name}": value for name, value in outcome.seconds.items()},
    )
