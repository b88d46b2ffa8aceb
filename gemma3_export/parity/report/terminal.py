"""The report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma3_export.parity.report.model import CaseResult, MetricResult, ParityReport

__all__ = ["HEADER", "case_row", "described", "render_terminal", "times", "verdict_line"]

HEADER = (
    "case",
    "positions",
    "max abs error",
    "floor",
    "ratio",
    "worst KV ratio",
    "mean KLD",
    "same top-1",
    "verdict",
)


SHOWN_FAILURES = 9


def render_terminal(report: ParityReport) -> str:
    """What was compared, how close it came, and the verdict on the last line."""
    compared = f"{described(report.candidate)} against {described(report.baseline)}"
    lines = [
        f"{compared}; noise floor: the reference in {report.floor_dtype}",
        "",
        *table([HEADER, *(case_row(case) for case in report.cases)]),
        "",
    ]
    for gate in report.gates:
        lines.append(f"{gate.name}: {'pass' if gate.passed else 'FAIL'}  ({gate.question})")
        lines += [f"  {metric_text(metric)}" for metric in gate.metrics]
    failed = list(failures(report))
    lines += [f"  {line}" for line in failed[:SHOWN_FAILURES]]
    if len(failed) > SHOWN_FAILURES:
        lines.append(f"  and {len(failed) - SHOWN_FAILURES} more, see the JSON report")
    if report.divergence is not None:
        lines += ["", divergence_text(report)]
    return "\n".join([*lines, "", verdict_line(report), ""])


def verdict_line(report: ParityReport) -> str:
    """One line that says it all."""
    cases = len(report.cases)
    positions = sum(case.positions for case in report.cases)
    ties = sum(case.ties for case in report.cases)
    seconds = sum(report.seconds.values())
    if report.passed:
        worst = max((ratio for case in report.cases if (ratio := worst_ratio(case))), default=0.0)
        tied = f", {ties} ties" if ties else ""
        return (
            f"PASS  {cases} cases, {positions} positions, every KV tensor; worst error "
            f"{times(worst)} x the noise floor (limit {report.options['factor']:g}){tied}, "
            f"{seconds:.1f} s"
        )
    return f"FAIL  {'; '.join(failed_parts(report))}, {seconds:.1f} s"


def failed_parts(report: ParityReport) -> Iterator[str]:
    """The cases that failed, then each gate with numbers of its own that failed."""
    bad = [case.name for case in report.cases if not case.passed]
    if bad:
        what = ", ".join([*bad[:4], *([f"and {len(bad) - 4} more"] if len(bad) > 4 else [])])
        yield f"{what} ({len(bad)} of {len(report.cases)} cases)"
    for gate in report.gates:
        beyond = [metric for metric in gate.metrics if not metric.passed]
        if beyond:
            numbers = " and ".join(
                f"{metric.name} is {metric.value:.3g} "
                f"({'at least' if metric.is_minimum else 'limit'} {metric.limit:.3g})"
                for metric in beyond
            )
            alone = "" if bad else f" (all {len(report.cases)} cases pass)"
            yield f"{gate.name}: {numbers}{alone}"


def divergence_text(report: ParityReport) -> str:
    """Where it went wrong first."""
    first = report.divergence
    assert first is not None
    place = "outside the layers" if first.layer is None else f"layer {first.layer}"
    return (
        f"first divergence: {place}, {first.block} at position {first.position} "
        f"(case {first.case}, step {first.step})\n  look at {first.explanation}"
    )


def described(runtime: dict[str, object]) -> str:
    """``onnx fp32 on cpu``."""
    target = f"/{runtime['target']}" if "target" in runtime else ""
    device = f" on {runtime['device']}" if "device" in runtime else ""
    half = f" with {runtime['activations']} activations" if "activations" in runtime else ""
    return f"{runtime.get('runtime')}{target} {runtime.get('dtype', '')}{half}{device}"


def case_row(case: CaseResult) -> tuple[str, ...]:
    """One case as cells."""
    error, kld = case.metric("logits_max_abs"), case.metric("logits_mean_kld")
    assert error is not None
    assert kld is not None
    same = sum(point.is_same_top1 for point in case.points)
    caches = [
        metric.ratio
        for metric in case.metrics
        if metric.name in ("key_max_abs", "value_max_abs") and metric.ratio is not None
    ]
    ties = f" ({case.ties} tied)" if case.ties else ""
    return (
        case.title if case.is_text else case.name,
        str(case.positions),
        f"{error.value:.2e}",
        f"{error.floor:.2e}",
        "" if error.ratio is None else times(error.ratio),
        times(max(caches)) if caches else "",
        f"{kld.value:.1e}",
        f"{same}/{case.positions}{ties}",
        "pass" if case.passed else "FAIL",
    )


def times(ratio: float) -> str:
    """A multiple of the floor, short even when it is absurd."""
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.1e}"


def worst_ratio(case: CaseResult) -> float | None:
    """Largest error of logits, keys or values in units of the floor."""
    ratios = [
        metric.ratio
        for metric in case.metrics
        if metric.ratio is not None and metric.name != "logits_mean_kld"
    ]
    return max(ratios, default=None)


def failures(report: ParityReport) -> Iterator[str]:
    """Every metric beyond its limit."""
    for case in report.cases:
        for metric in case.metrics:
            if not metric.passed:
                yield f"{case.name}: {metric_text(metric)}"


def metric_text(metric: MetricResult) -> str:
    """``logits_max_abs 1.2e-3 (limit 1e-5, floor 1e-6)``."""
    limit = "at least" if metric.is_minimum else "limit"
    floor = "" if metric.floor is None else f", floor {metric.floor:.3g}"
    where = f" in {metric.where}" if metric.where else ""
    mark = "" if metric.passed else "  FAIL"
    return f"{metric.name} {metric.value:.4g}{where} ({limit} {metric.limit:.3g}{floor}){mark}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned: the first and last to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index in (0, len(row) - 1) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
