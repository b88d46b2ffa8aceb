"""A benchmark's speeds as an SVG image of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["speed_plot"]

WIDTH, NAMES, BARS, VALUES = 860, 170, 200, 70
ROW, TITLE, GAP = 22, 44, 18
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}"
    ".small{font-size:11px;fill:#57606a}.ours{fill:#1f6feb}.peer{fill:#9aa7b4}"
    ".spread{stroke:#24292f;stroke-width:1.2}"
)
COLUMNS = (("prefill_tokens_per_s", "prefill"), ("decode_tokens_per_s", "decode"))


def speed_plot(report: Mapping[str, Any]) -> str:
    """Bars of the medians, with a line from the least to the greatest, for each case.

    Args:
        report: from :func:`gemma3_export.bench.run.run_benchmark`.
    """
    parts: list[str] = []
    top = 8
    for case in report["cases"]:
        parts += case_parts(case, top)
        top += TITLE + ROW * len(case["candidates"]) + GAP
    machine = report["machine"]
    note = (
        f"{machine['processor']}, {report['options']['threads']} threads; "
        f"medians of {report['options']['repeat']}, lines from the least to the greatest"
    )
    parts.append(f'<text class="small" x="8" y="{top + 4}">{escape(note)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 16}" '
        f'width="{WIDTH}" height="{top + 16}" role="img" aria-label="Speeds">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def case_parts(case: Mapping[str, Any], top: int) -> Iterator[str]:
    """Title and rows of one case."""
    title = f"prompt {case['prompt_tokens']}, batch {case['batch']}"
    yield f'<text class="title" x="8" y="{top + 14}">{title}</text>'
    names = list(case["candidates"])
    for index, name in enumerate(names):
        y = top + TITLE + index * ROW
        yield f'<text x="{NAMES - 10}" y="{y + 5}" text-anchor="end">{escape(name)}</text>'
    for column, (key, label) in enumerate(COLUMNS):
        left = NAMES + column * (BARS + VALUES + 60)
        yield f'<text class="small" x="{left}" y="{top + 28}">{label}, tokens/s</text>'
        most = max(case["candidates"][name][key]["max"] for name in names)
        for index, name in enumerate(names):
            style = "peer" if index else "ours"
            yield from bar(
                case["candidates"][name][key],
                most,
                (left, top + TITLE + index * ROW),
                style,
            )


def bar(values: Mapping[str, float], most: float, at: tuple[int, int], style: str) -> Iterator[str]:
    """A median's bar, its spread and its number."""
    left, y = at
    median, low, high = (values[key] / most * BARS for key in ("median", "min", "max"))
    yield f'<rect class="{style}" x="{left}" y="{y - 6}" width="{median:.1f}" height="13" rx="2"/>'
    yield (
        f'<path class="spread" d="M{left + low:.1f} {y}H{left + high:.1f}'
        f'M{left + low:.1f} {y - 3}v6M{left + high:.1f} {y - 3}v6"/>'
    )
    yield f'<text x="{left + BARS + 8}" y="{y + 5}">{values["median"]:.1f}</text>'
