"""Render the report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gemma3_export.parity.report.model import CaseResult, Divergence, MetricResult, ParityReport

__all__ = [
    "HEADER",
    "case_row",
    "describe_divergence",
    "describe_metric",
    "describe_runtime",
    "format_ratio",
    "render_terminal",
    "verdict_line",
]

HEADER = (
    "case",
    "positions",
    "max abs error",
    "noise floor",
    "ratio",
    "worst KV ratio",
    "mean KLD",
    "same top-1",
    "verdict",
)
MAX_FAILURES = 9


def render_terminal(report: ParityReport) -> str:
    """Return the comparison case by case, the gates, and the verdict on the last line."""
    compared = f"{describe_runtime(report.candidate)} against {describe_runtime(report.baseline)}"
    lines = [
        f"{compared}; noise floor: the reference in {report.noise_floor_dtype}",
        "",
        *table([HEADER, *(case_row(case) for case in report.cases)]),
        "",
    ]
    for gate in report.gates:
        lines.append(f"{gate.name}: {'pass' if gate.passed else 'FAIL'}  ({gate.question})")
        lines += [f"  {describe_metric(metric)}" for metric in gate.metrics]
    failures = [
        f"  {case.name}: {describe_metric(metric)}"
        for case in report.cases
        for metric in case.metrics
        if not metric.passed
    ]
    lines += failures[:MAX_FAILURES]
    if len(failures) > MAX_FAILURES:
        lines.append(f"  and {len(failures) - MAX_FAILURES} more, see the JSON report")
    if report.divergence is not None:
        lines += ["", describe_divergence(report.divergence)]
    return "\n".join([*lines, "", verdict_line(report), ""])


def verdict_line(report: ParityReport) -> str:
    """Return the verdict and the numbers that decided it, on one line."""
    seconds = sum(report.seconds.values())
    if not report.passed:
        return f"FAIL  {'; '.join(failed_parts(report))}, {seconds:.1f} s"
    ties = f", {report.ties} ties" if report.ties else ""
    return (
        f"PASS  {len(report.cases)} cases, {report.positions} positions, every KV tensor; worst "
        f"error {format_ratio(report.worst_ratio)} x the noise floor "
        f"(limit {report.options.factor:g}){ties}, {seconds:.1f} s"
    )


def failed_parts(report: ParityReport) -> Iterator[str]:
    """Yield the failed cases, then each failed gate that has metrics of its own."""
    failed = [case.name for case in report.cases if not case.passed]
    if failed:
        more = [f"and {len(failed) - 4} more"] if len(failed) > 4 else []
        names = ", ".join([*failed[:4], *more])
        yield f"{names} ({len(failed)} of {len(report.cases)} cases)"
    for gate in report.gates:
        beyond = [metric for metric in gate.metrics if not metric.passed]
        if beyond:
            numbers = " and ".join(
                f"{metric.name} is {metric.value:.3g} "
                f"({'at least' if metric.is_minimum else 'limit'} {metric.limit:.3g})"
                for metric in beyond
            )
            alone = "" if failed else f" (all {len(report.cases)} cases pass)"
            yield f"{gate.name}: {numbers}{alone}"


def describe_divergence(first: Divergence) -> str:
    """Return the place of the first divergence and what to check there."""
    return (
        f"first divergence: {first.place}, {first.block} at position {first.position} "
        f"(case {first.case}, step {first.step})\n  check {first.explanation}"
    )


def describe_runtime(runtime: Mapping[str, object]) -> str:
    """Return a phrase such as ``onnx/ort fp32 on cpu``."""
    target = f"/{runtime['target']}" if "target" in runtime else ""
    device = f" on {runtime['device']}" if "device" in runtime else ""
    half = f" with {runtime['activations']} activations" if "activations" in runtime else ""
    return f"{runtime.get('runtime')}{target} {runtime.get('dtype', '')}{half}{device}"


def case_row(case: CaseResult) -> tuple[str, ...]:
    """Return the cells of one case, in the order of :data:`HEADER`."""
    error, kld = case.metric("logits_max_abs"), case.metric("logits_mean_kld")
    assert error is not None
    assert kld is not None
    cache_ratio = case.worst_ratio("key_max_abs", "value_max_abs")
    ties = f" ({case.ties} tied)" if case.ties else ""
    return (
        case.label,
        str(case.positions),
        f"{error.value:.2e}",
        f"{error.noise_floor:.2e}",
        format_ratio(error.ratio),
        format_ratio(cache_ratio),
        f"{kld.value:.1e}",
        f"{case.top1_matches}/{case.positions}{ties}",
        "pass" if case.passed else "FAIL",
    )


def format_ratio(ratio: float | None) -> str:
    """Return a multiple of the noise floor in few characters; empty for None."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.1e}"


def describe_metric(metric: MetricResult) -> str:
    """Return a phrase such as ``logits_max_abs 1.2e-3 (limit 1e-5, noise floor 1e-6)``."""
    limit = "at least" if metric.is_minimum else "limit"
    floor = "" if metric.noise_floor is None else f", noise floor {metric.noise_floor:.3g}"
    where = f" in {metric.where}" if metric.where else ""
    mark = "" if metric.passed else "  FAIL"
    return f"{metric.name} {metric.value:.4g}{where} ({limit} {metric.limit:.3g}{floor}){mark}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines: the first and last columns to the left, numbers to the right."""
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
