"""Small charts as inline SVG; colours are CSS classes, so that the page's theme reaches them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "LogScale", "Mark", "histogram", "log_chart", "share_bars"]

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 48


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot at (x, y) of a chart."""

    x: float
    y: float
    style: str  # CSS class
    label: str  # shown on hover


@dataclass(frozen=True, slots=True)
class Bar:
    """A share between 0 and 1."""

    label: str
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class LogScale:
    """Decades to pixels; what is not above the lowest decade lies on it."""

    low: int  # exponent of ten
    high: int

    @classmethod
    def over(cls, values: Sequence[float]) -> LogScale:
        """The decades that hold all positive finite values."""
        known = [value for value in values if 0 < value < math.inf]
        if not known:
            return cls(-8, 0)
        low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
        return cls(low, max(high, low + 1))

    def pixel(self, value: float) -> float:
        """Vertical place of a value."""
        if not value > 10.0**self.low:
            return HEIGHT - BOTTOM
        if not value < 10.0**self.high:
            return TOP
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Place and label of the decades, at most seven of them."""
        step = max(1, math.ceil((self.high - self.low) / 6))
        for exponent in range(self.low, self.high + 1, step):
            yield self.pixel(10.0**exponent), f"1e{exponent}"


def log_chart(
    marks: Sequence[Mark],
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    x_range: tuple[float, float],
    x_label: str,
    x_ticks: Sequence[tuple[float, str]],
    guides: Sequence[tuple[float, str]] = (),
    title: str,
) -> str:
    """Dots and lines over a linear x and a logarithmic y.

    Args:
        marks: dots.
        lines: (CSS class, points) of each line.
        x_range: first and last x.
        x_label: what x is.
        x_ticks: (x, label).
        guides: vertical lines with a label.
        title: for screen readers.
    """
    values = [mark.y for mark in marks] + [y for _, line in lines for _, y in line]
    scale = LogScale.over(values)
    span = max(x_range[1] - x_range[0], 1e-9)

    def across(x: float) -> float:
        return LEFT + (x - x_range[0]) / span * (WIDTH - LEFT - RIGHT)

    parts = [*grid(scale), *(x_tick(across(x), label) for x, label in x_ticks)]
    for x, label in guides:
        at = across(x)
        anchor = "end" if at > WIDTH * 0.7 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(
            f'<line class="guide" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="guide-label" x="{at + shift:.1f}" y="{TOP + 12}" '
            f'text-anchor="{anchor}">{escape(label)}</text>'
        )
    for style, line in lines:
        path = " ".join(f"{across(x):.1f},{scale.pixel(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
    parts += [
        f'<circle class="{mark.style}" cx="{across(mark.x):.1f}" cy="{scale.pixel(mark.y):.1f}" '
        f'r="2.6"><title>{escape(mark.label)}</title></circle>'
        for mark in marks
    ]
    parts.append(axis_label(x_label))
    return svg(parts, title)


def histogram(values: Sequence[float], *, x_label: str, title: str, limit: float) -> str:
    """How many values fall into each half decade; zeros count in the first."""
    scale = LogScale.over([value for value in values if value > 1e-18])
    edges = [scale.low + step / 2 for step in range(2 * (scale.high - scale.low) + 1)]
    counts = [0] * (len(edges) - 1)
    for value in values:
        exponent = math.log10(value) if 0 < value < math.inf else scale.low
        if value == math.inf:
            exponent = scale.high
        index = int((exponent - scale.low) * 2)
        counts[min(max(index, 0), len(counts) - 1)] += 1
    width = (WIDTH - LEFT - RIGHT) / len(counts)
    most = max(1, *counts)
    bottom = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>']
    for index, count in enumerate(counts):
        tall = count / most * (HEIGHT - BOTTOM - TOP - 16)
        style = "bar" if edges[index] < math.log10(limit) else "bar bad"
        left = LEFT + index * width
        parts.append(
            f'<rect class="{style}" x="{left + 1:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
            f'width="{max(width - 2, 1):.1f}" height="{tall:.1f}" rx="2">'
            f"<title>{count} positions around 1e{edges[index] + 0.25:.1f}</title></rect>"
        )
        if count:
            parts.append(
                f'<text class="tick" x="{left + width / 2:.1f}" '
                f'y="{HEIGHT - BOTTOM - tall - 5:.1f}" text-anchor="middle">{count}</text>'
            )
    every = max(1, math.ceil((scale.high - scale.low) / 8))
    for exponent in range(scale.low, scale.high + 1, every):
        x = LEFT + (exponent - scale.low) * 2 * width
        parts.append(x_tick(x, f"1e{exponent}"))
    return svg([*parts, axis_label(x_label)], title)


def share_bars(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars from 0 to 1, one a row."""
    row, label_width, text_width = 24, 210, 130
    height = row * len(bars) + 6
    full = WIDTH - label_width - text_width
    parts = []
    for index, bar in enumerate(bars):
        y = index * row + 4
        style = "bar" if bar.share >= 1 else "bar part"
        parts.append(
            f'<text class="name" x="{label_width - 10}" y="{y + 14}" text-anchor="end">'
            f"{escape(bar.label)}</text>"
            f'<rect class="track" x="{label_width}" y="{y + 3}" width="{full}" height="14" rx="3"/>'
            f'<rect class="{style}" x="{label_width}" y="{y + 3}" width="{full * bar.share:.1f}" '
            f'height="14" rx="3"/>'
            f'<text class="name" x="{label_width + full + 10}" y="{y + 14}">'
            f"{escape(bar.text)}</text>"
        )
    return svg(parts, title, height)


def grid(scale: LogScale) -> Iterator[str]:
    """Horizontal lines at the decades."""
    for y, label in scale.ticks():
        yield (
            f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )


def x_tick(x: float, label: str) -> str:
    """A label under the x axis."""
    return (
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )


def axis_label(text: str) -> str:
    """What the x axis shows."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text class="axis-label" x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def svg(parts: Sequence[str], title: str, height: int = HEIGHT) -> str:
    """The drawing itself."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
