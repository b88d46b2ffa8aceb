"""Lay out the charts of the HTML report: values become pixels, and the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gemma3_export.parity.report.model import LayerResult, ParityReport, PointResult

__all__ = ["Chart", "charts_for"]

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 56, WIDTH - 22, 14, HEIGHT - 48  # edges of the plot area
MAX_DOTS = 600


class Label(NamedTuple):
    """A label at a position along an axis, in pixels."""

    at: float
    text: str


class Dot(NamedTuple):
    """A measured value; ``style`` is a CSS class and ``text`` a tooltip."""

    x: float
    y: float
    style: str
    text: str


class Bar(NamedTuple):
    """A rectangle with a number above it."""

    x: float
    y: float
    width: float
    height: float
    style: str
    positions: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One drawing. All coordinates are pixels in a box of WIDTH x HEIGHT."""

    title: str
    note: str
    x_label: str
    x_ticks: Sequence[Label]
    y_ticks: Sequence[Label] = ()
    guides: Sequence[Label] = ()  # vertical lines
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]] = ()  # (CSS class, points)
    dots: Sequence[Dot] = ()
    bars: Sequence[Bar] = ()
    legend: Sequence[tuple[str, str]] = ()  # (color variable, text)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from values to pixels, which clips at both ends."""

    low: float
    high: float
    start: float  # pixel of ``low``
    end: float  # pixel of ``high``

    def __call__(self, value: float) -> float:
        share = (value - self.low) / max(self.high - self.low, 1e-9)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def decades(self, most: int) -> list[Label]:
        """Return labels for at most ``most`` + 1 integers of a scale of exponents."""
        low, high = int(self.low), int(self.high)
        step = max(1, math.ceil((high - low) / most))
        return [Label(self(n), f"1e{n}") for n in range(low, high + 1, step)]


def decade_range(values: Sequence[float]) -> tuple[int, int]:
    """Return the exponents of ten that enclose all positive finite values."""
    known = [math.log10(value) for value in values if 0 < value < math.inf]
    if not known:
        return -8, 0
    low = math.floor(min(known))
    return low, max(math.ceil(max(known)), low + 1)


def exponent(value: float) -> float:
    """Return the decimal logarithm; it is infinite for zero and infinity."""
    return math.log10(value) if 0 < value < math.inf else math.copysign(math.inf, value - 1)


def charts_for(report: ParityReport) -> list[Chart]:
    """Return the charts of a report, in the order of the page."""
    return [position_chart(report), layer_chart(report), divergence_chart(report)]


def position_chart(report: ParityReport) -> Chart:
    """Plot the logit error along the long sequence, the worst case at each position."""
    sequence = report.cases[0].points[0].sequence
    worst: dict[int, PointResult] = {}
    for point in (point for case in report.cases for point in case.points):
        known = worst.get(point.position)
        if point.sequence == sequence and (known is None or point.max_abs > known.max_abs):
            worst[point.position] = point
    limit = max(
        metric.limit
        for case in report.cases
        if not case.is_text and (metric := case.metric("logits_max_abs"))
    )
    last = max(worst)
    x = Scale(0, last, LEFT, RIGHT)
    values = [n for point in worst.values() for n in (point.max_abs, point.noise_floor)]
    y = Scale(*decade_range([*values, limit]), BOTTOM, TOP)
    dots = []
    for position in sorted(worst)[:: max(1, len(worst) // MAX_DOTS)]:
        error, floor = worst[position].max_abs, worst[position].noise_floor
        at, text = x(position), f"position {position}: {error:.2e}, noise floor {floor:.2e}"
        dots.append(Dot(at, y(exponent(floor)), "noise", text))
        dots.append(Dot(at, y(exponent(error)), "key" if error <= limit else "beyond", text))
    window = report.model.sliding_window
    edges = [(window, f"window {window}"), (2 * window, f"twice the window: {2 * window}")]
    return Chart(
        title="Logit error by position",
        note="Largest error of all cases at each position.",
        legend=[("key", "runtime"), ("soft", "noise floor"), ("bad", "limit")],
        x_label="position in the long sequence",
        x_ticks=[Label(x(n), str(n)) for n in range(0, last + 1, round_step(last))],
        y_ticks=y.decades(6),
        guides=[Label(x(n - 0.5), text) for n, text in edges if n <= last],
        lines=[("limit", [(LEFT, y(exponent(limit))), (RIGHT, y(exponent(limit)))])],
        dots=dots,
    )


def layer_chart(report: ParityReport) -> Chart:
    """Plot the largest error of each layer's keys and values, relative to its limit."""
    worst: dict[tuple[int, str], LayerResult] = {}
    for item in (item for case in report.cases for item in case.layers):
        known = worst.get((item.layer, item.kind))
        if known is None or item.share_of_limit > known.share_of_limit:
            worst[item.layer, item.kind] = item
    count = report.model.num_hidden_layers
    x = Scale(-0.5, count - 0.5, LEFT, RIGHT)
    values = [n for item in worst.values() for n in (item.max_abs, item.noise_floor)]
    y = Scale(*decade_range(values), BOTTOM, TOP)
    dots, lines = [], []
    for kind, shift in (("key", -0.08), ("value", 0.08)):
        items = [worst[n, kind] for n in range(count) if (n, kind) in worst]
        lines.append((f"floor-{kind}", [(x(i.layer), y(exponent(i.noise_floor))) for i in items]))
        dots += [
            Dot(
                x(item.layer + shift),
                y(exponent(item.max_abs)),
                kind if item.passed else "beyond",
                f"layer {item.layer} {kind}: {item.max_abs:.2e}, "
                f"noise floor {item.noise_floor:.2e}",
            )
            for item in items
        ]
    kinds = report.model.layer_types
    return Chart(
        title="KV cache error by layer",
        note="Dots: runtime. Lines: noise floor of the same tensor.",
        legend=[("key", "keys"), ("value", "values")],
        x_label="layer",
        x_ticks=[Label(x(n), str(n)) for n in range(0, count, max(1, count // 16))],
        y_ticks=y.decades(6),
        guides=[Label(x(n), "full") for n, kind in enumerate(kinds) if kind == "full_attention"],
        lines=lines,
        dots=dots,
    )


def divergence_chart(report: ParityReport) -> Chart:
    """Count the KL divergences of all positions by half decade; zeros go into the first."""
    values = [point.kld for case in report.cases for point in case.points]
    limit = report.options.max_mean_kld
    low, high = decade_range([value for value in values if value > 1e-18])
    x = Scale(low, high, LEFT, RIGHT)
    counts = [0] * (2 * (high - low))
    for value in values:
        index = 2 * (min(max(exponent(value), low), high) - low)
        counts[min(int(index), len(counts) - 1)] += 1
    y = Scale(0, max(1, *counts), BOTTOM, TOP + 16)
    bars = [
        Bar(
            x(low + index / 2) + 1,
            y(count),
            max((RIGHT - LEFT) / len(counts) - 2, 1),
            BOTTOM - y(count),
            "bar" if low + index / 2 < math.log10(limit) else "bar bad",
            count,
            f"{count} positions around 1e{low + index / 2 + 0.25:.1f}",
        )
        for index, count in enumerate(counts)
    ]
    return Chart(
        title="KL divergence",
        note=f"Histogram over {len(values)} compared positions.",
        x_label="KL divergence of the next-token distribution, nats",
        x_ticks=x.decades(8),
        bars=bars,
    )


def round_step(last: int) -> int:
    """Return a round tick interval that gives at most ten ticks from 0 to ``last``."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    return next((step for step in steps if last / step <= 9), 5000)
