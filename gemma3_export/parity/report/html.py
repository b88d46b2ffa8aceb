"""The report as one self-contained page: no scripts, no fonts, nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from gemma3_export.parity.report.model import MetricResult, ParityReport
from gemma3_export.parity.report.page_charts import (
    agreement_chart,
    divergence_chart,
    layer_chart,
    position_chart,
)
from gemma3_export.parity.report.page_style import STYLE
from gemma3_export.parity.report.terminal import HEADER, case_row, described, times, worst_ratio

__all__ = ["render_html"]


def render_html(report: ParityReport) -> str:
    """The whole page."""
    title = f"Parity: {described(report.candidate)}"
    body = [
        header(report),
        cards(report),
        divergence_box(report),
        '<div class="charts">',
        position_chart(report),
        layer_chart(report),
        divergence_chart(report),
        agreement_chart(report),
        "</div>",
        case_table(report),
        gate_table(report),
        '<div class="pair">',
        facts("Environment", environment(report)),
        facts("Options and timings", settings(report)),
        "</div>",
        facts("Weights and files", {**flatten(report.source), **report.files}, folded=True),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def header(report: ParityReport) -> str:
    """Verdict and what was compared with what."""
    style, word = ("", "PASS") if report.passed else (" bad", "FAIL")
    model = report.model
    size = f"{float(str(model['num_parameters'])) / 1e6:,.1f} M parameters"
    return (
        f'<header><h1>Parity report</h1><span class="verdict{style}">{word}</span>'
        f"<p>{escape(described(report.candidate))} against "
        f"{escape(described(report.baseline))} &middot; {model['num_hidden_layers']} layers, "
        f"{size}, window {model['sliding_window']} &middot; {escape(report.created)}</p></header>"
    )


def cards(report: ParityReport) -> str:
    """The numbers one looks for first."""
    points = [point for case in report.cases for point in case.points]
    same = sum(point.is_same_top1 for point in points)
    worst = max((ratio for case in report.cases if (ratio := worst_ratio(case))), default=0.0)
    kld = sum(point.kld for point in points) / max(1, len(points))
    error = max((point.max_abs for point in points), default=0.0)
    factor = float(str(report.options["factor"]))
    shown = [
        (f"{times(worst)} &times;", f"worst error, in units of the noise floor (limit {factor:g})"),
        (number(error), "largest error of a logit"),
        (number(kld), "mean KL divergence, nats"),
        (f"{same} / {len(points)}", "same greedy token"),
        (f"{sum(case.ties for case in report.cases)}", "ties within the tolerance"),
        (f"{sum(case.passed for case in report.cases)} / {len(report.cases)}", "cases passed"),
    ]
    items = (
        f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in shown
    )
    return f'<div class="cards">{"".join(items)}</div>'


def divergence_box(report: ParityReport) -> str:
    """Where a failing runtime left the reference first."""
    first = report.divergence
    if first is None:
        return ""
    place = "outside the layers" if first.layer is None else f"layer {first.layer}"
    return (
        f'<section class="alarm"><h2>First divergence: {place}, <code>{escape(first.block)}</code>'
        f"</h2><p>Case {escape(first.case)}, step {first.step}, position {first.position} of "
        f"&ldquo;{escape(first.sequence)}&rdquo;. Look at {escape(first.explanation)}.</p>"
        "</section>"
    )


def case_table(report: ParityReport) -> str:
    """The terminal's table, with each case's title."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEADER)
    rows = []
    for case in report.cases:
        *cells, _ = case_row(case)
        tds = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr title="{escape(case.title)}">{tds}{verdict_cell(case.passed)}</tr>')
    return (
        "<section><h2>Cases</h2><p class='soft'>The same tokens, fed in every way that must give "
        "the same numbers. The floor is the reference&rsquo;s own rounding error in "
        f"{escape(report.floor_dtype)} at the same positions.</p><div class='scroll'><table>"
        f"<tr>{head}</tr>{''.join(rows)}</table></div></section>"
    )


def gate_table(report: ParityReport) -> str:
    """Both gates with their thresholds."""
    rows = []
    for gate in report.gates:
        rows.append(
            f'<tr><td class="wrap"><b>{escape(gate.name)}</b> '
            f'<span class="soft">{escape(gate.question)}</span></td><td></td><td></td>'
            f"{verdict_cell(gate.passed)}</tr>"
        )
        rows += [metric_row(metric) for metric in gate.metrics]
        if gate.name == "implementation":
            rows += [
                metric_row(metric, prefix=f"{case.name}: ")
                for case in report.cases
                for metric in case.metrics
                if not metric.passed
            ][:24]
    return (
        "<section><h2>Gates</h2><div class='scroll'><table><tr><th>metric</th><th>value</th>"
        f"<th>limit</th><th>verdict</th></tr>{''.join(rows)}</table></div></section>"
    )


def metric_row(metric: MetricResult, prefix: str = "") -> str:
    """One metric against its limit."""
    sign = "&ge;" if metric.is_minimum else "&le;"
    where = f" ({metric.where})" if metric.where else ""
    return (
        f"<tr><td>{escape(prefix + metric.name + where)}</td><td>{number(metric.value)}</td>"
        f"<td>{sign} {number(metric.limit)}</td>{verdict_cell(metric.passed)}</tr>"
    )


def verdict_cell(passed: bool) -> str:
    """Words, so that colour is not the only difference."""
    return f'<td class="{"good" if passed else "wrong"}">{"pass" if passed else "FAIL"}</td>'


def environment(report: ParityReport) -> dict[str, str]:
    """What ran where."""
    found = {f"candidate {key}": text(value) for key, value in report.candidate.items()}
    found |= {f"baseline {key}": text(value) for key, value in report.baseline.items()}
    return found | report.versions


def settings(report: ParityReport) -> dict[str, str]:
    """What was asked for, and how long it took."""
    found = {key.replace("_", " "): text(value) for key, value in report.options.items()}
    return found | {key: f"{value:.1f} s" for key, value in report.seconds.items()}


def facts(title: str, items: Mapping[str, str], *, folded: bool = False) -> str:
    """A two-column table."""
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="wrap"><code>{escape(value)}</code></td></tr>'
        for key, value in items.items()
    )
    table = f'<div class="scroll"><table>{rows}</table></div>'
    if folded:
        return f"<section><details><summary>{escape(title)}</summary>{table}</details></section>"
    return f"<section><h2>{escape(title)}</h2>{table}</section>"


def flatten(data: Mapping[str, object], prefix: str = "source") -> dict[str, str]:
    """Nested facts as dotted names."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        name = f"{prefix} {key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, name)
        else:
            flat[name] = text(value)
    return flat


def text(value: object) -> str:
    """A value for people."""
    if isinstance(value, Sequence | Iterable) and not isinstance(value, str):
        return ", ".join(str(item) for item in value)
    return "not set" if value is None else str(value)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
