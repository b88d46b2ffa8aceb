"""The four charts of the HTML report."""

from __future__ import annotations

from collections.abc import Sequence

from gemma3_export.parity.report.model import CaseResult, LayerResult, ParityReport, PointResult
from gemma3_export.parity.report.svg import Bar, Mark, histogram, log_chart, share_bars

__all__ = ["agreement_chart", "divergence_chart", "layer_chart", "position_chart"]

MOST_MARKS = 600


def position_chart(report: ParityReport) -> str:
    """Error of the logits along the long sequence, with the window's edges."""
    window = int(str(report.model["sliding_window"]))
    long = report.cases[0].points[0].sequence
    worst = worst_by_position(report.cases, long)
    places = sorted(worst)
    last = places[-1]
    limits = [
        metric.limit
        for case in report.cases
        if not case.is_text and (metric := case.metric("logits_max_abs"))
    ]
    marks = [
        Mark(
            place,
            worst[place].max_abs,
            "key" if worst[place].max_abs <= max(limits) else "beyond",
            f"position {place}: {worst[place].max_abs:.2e}, floor {worst[place].floor:.2e}",
        )
        for place in places[:: max(1, len(places) // MOST_MARKS)]
    ]
    guides = [(window - 0.5, f"window {window}")]
    if 2 * window <= last:
        guides.append((2 * window - 0.5, f"twice: {2 * window}"))
    floors = [
        Mark(
            place, worst[place].floor, "noise", f"position {place}: floor {worst[place].floor:.2e}"
        )
        for place in places[:: max(1, len(places) // MOST_MARKS)]
    ]
    chart = log_chart(
        [*floors, *marks],
        [("limit", [(0, max(limits)), (last, max(limits))])],
        x_range=(0, last),
        x_label="position in the long sequence",
        x_ticks=ticks(last),
        guides=[guide for guide in guides if guide[0] <= last],
        title="Largest logit error at each position",
    )
    legend = [("key", "runtime"), ("soft", "noise floor"), ("bad", "limit")]
    return section("Logit error by position", "Worst over all cases.", chart, legend)


def worst_by_position(cases: Sequence[CaseResult], sequence: str) -> dict[int, PointResult]:
    """The point with the largest error at each position of one sequence."""
    worst: dict[int, PointResult] = {}
    for case in cases:
        for point in case.points:
            if point.sequence != sequence:
                continue
            known = worst.get(point.position)
            if known is None or point.max_abs > known.max_abs:
                worst[point.position] = point
    return worst


def layer_chart(report: ParityReport) -> str:
    """Error of keys and values in each layer."""
    worst: dict[tuple[int, str], LayerResult] = {}
    for case in report.cases:
        for item in case.layers:
            known = worst.get((item.layer, item.kind))
            if known is None or item.max_abs / item.limit > known.max_abs / known.limit:
                worst[item.layer, item.kind] = item
    count = int(str(report.model["num_hidden_layers"]))
    marks = [
        Mark(
            layer + (-0.08 if kind == "key" else 0.08),
            item.max_abs,
            kind if item.passed else "beyond",
            f"layer {layer} {kind}: {item.max_abs:.2e}, floor {item.floor:.2e}",
        )
        for (layer, kind), item in sorted(worst.items())
    ]
    lines = [
        (f"floor-{kind}", [(n, worst[n, kind].floor) for n in range(count) if (n, kind) in worst])
        for kind in ("key", "value")
    ]
    kinds = report.model["layer_types"]
    assert isinstance(kinds, list)
    step = max(1, count // 16)
    chart = log_chart(
        marks,
        lines,
        x_range=(-0.5, count - 0.5),
        x_label="layer",
        x_ticks=[(n, str(n)) for n in range(0, count, step)],
        guides=[(n, "full") for n, kind in enumerate(kinds) if kind == "full_attention"],
        title="Largest error of keys and values in each layer",
    )
    legend = [("key", "keys"), ("value", "values")]
    return section(
        "Cache error by layer",
        "Dots: runtime. Lines: noise floor of the same tensor.",
        chart,
        legend,
    )


def divergence_chart(report: ParityReport) -> str:
    """How the divergence is spread."""
    values = [point.kld for case in report.cases for point in case.points]
    limit = float(str(report.options["max_mean_kld"]))
    chart = histogram(
        values,
        x_label="KL divergence of the next-token distribution, nats",
        title="Histogram of KL divergences",
        limit=limit,
    )
    return section("KL divergence", f"{len(values)} compared positions.", chart, [])


def agreement_chart(report: ParityReport) -> str:
    """Share of positions with the same greedy token, case by case."""
    bars = []
    for case in report.cases:
        same = sum(point.is_same_top1 for point in case.points)
        ties = f", {case.ties} tied" if case.ties else ""
        name = case.title if case.is_text else case.name
        bars.append(Bar(name, same / case.positions, f"{same}/{case.positions}{ties}"))
    chart = share_bars(bars, title="Share of positions with the same greedy token")
    return section("Same greedy token", "A tie is no disagreement.", chart, [])


def section(title: str, note: str, chart: str, legend: Sequence[tuple[str, str]]) -> str:
    """A titled chart."""
    items = "".join(
        f'<span><i style="background:var(--{color})"></i>{label}</span>' for color, label in legend
    )
    shown = f'<div class="legend">{items}</div>' if items else ""
    return f'<section><h2>{title}</h2><p class="soft">{note}</p>{shown}{chart}</section>'


def ticks(last: int) -> list[tuple[float, str]]:
    """About eight round positions."""
    step = next(
        (n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if last / n <= 9), 5000
    )
    return [(float(place), str(place)) for place in range(0, last + 1, step)]
