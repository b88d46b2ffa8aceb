"""Render the report as one self-contained HTML page without scripts or external resources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from jinja2 import Environment, PackageLoader, StrictUndefined

from gemma3_export.parity.report import charts
from gemma3_export.parity.report.model import MetricResult, ParityReport
from gemma3_export.parity.report.terminal import HEADER, case_row, describe_runtime, format_ratio

__all__ = ["environment", "render_html"]

TEMPLATE = "page.html.jinja"
MAX_FAILURES = 24


def render_html(report: ParityReport, name: str = "") -> str:
    """Return the page as text.

    Args:
        report: the result.
        name: the name of the bundle, for the heading.
    """
    template = environment().get_template(TEMPLATE)
    return template.render(
        report=report,
        name=name,
        weights=weights_of(report),
        cards=headline_numbers(report),
        charts=charts.charts_for(report),
        plot=charts,
        header=HEADER,
        case_row=case_row,
        failures=failed_metrics(report),
        environment=flatten({"candidate": report.candidate, "baseline": report.baseline})
        | report.versions,
        settings={
            name.replace("_", " "): str(value) for name, value in asdict(report.options).items()
        }
        | {name: f"{value:.1f} s" for name, value in report.seconds.items()},
        files=flatten({"source": report.source}) | report.files,
    )


def environment() -> Environment:
    """Return what renders the templates of this folder; text from a report is escaped."""
    found = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters |= {"number": format_number, "runtime": describe_runtime}
    return found


def weights_of(report: ParityReport) -> str:
    """Return the weights that the bundle was made from, for the heading."""
    kind, location = report.source.get("kind"), report.source.get("location")
    return " ".join(str(part) for part in (kind, location) if part)


def headline_numbers(report: ParityReport) -> list[tuple[str, str]]:
    """Return the most important numbers as (value, caption)."""
    points = [point for case in report.cases for point in case.points]
    kld = sum(point.kld for point in points) / max(1, len(points))
    matches = sum(case.top1_matches for case in report.cases)
    passed = sum(case.passed for case in report.cases)
    return [
        (
            f"{format_ratio(report.worst_ratio)} \N{MULTIPLICATION SIGN}",
            f"worst error as a multiple of the noise floor (limit {report.options.factor:g})",
        ),
        (format_number(max((point.max_abs for point in points), default=0.0)), "max logit error"),
        (format_number(kld), "mean KL divergence, nats"),
        (f"{matches} / {len(points)}", "same greedy token"),
        (str(report.ties), "ties within the tolerance"),
        (f"{passed} / {len(report.cases)}", "cases passed"),
    ]


def failed_metrics(report: ParityReport) -> list[tuple[str, MetricResult]]:
    """Return the first failed metrics of all cases as (case name, metric)."""
    return [
        (case.name, metric) for case in report.cases for metric in case.metrics if not metric.passed
    ][:MAX_FAILURES]


def flatten(data: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return nested mappings as one, with the keys of each path joined by spaces."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key} ")
        else:
            flat[prefix + key] = format_value(value)
    return flat


def format_value(value: object) -> str:
    """Return a value as text; lists are separated by commas."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(str(item) for item in value)
    return "not set" if value is None else str(value)


def format_number(value: float) -> str:
    """Return three significant digits."""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
