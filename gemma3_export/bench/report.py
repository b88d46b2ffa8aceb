"""Rounds of a benchmark as medians, ranges and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gemma3_export.bench.process import Worker

__all__ = [
    "describe_case",
    "ratios",
    "speed_plot",
    "spread",
    "table_lines",
]

SPREADS = (
    "time_to_first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "busy_processors",
)


def describe_case(
    workers: Sequence[Worker],
    case: tuple[int, int],
    rounds: Sequence[Sequence[dict[str, Any]]],
    new_tokens: int,
    bandwidth: float | None,
) -> dict[str, Any]:
    """Speeds of all candidates, and how the first compares with the others."""
    prompt_tokens, batch = case
    speeds = [
        [speed(one, batch, prompt_tokens, new_tokens) for one in one_round] for one_round in rounds
    ]
    candidates = {}
    for index, worker in enumerate(workers):
        found = summary([one_round[index] for one_round in speeds])
        size = worker.facts["describe"].get("bytes_per_token")
        if size and bandwidth:
            steps_per_s = found["decode_tokens_per_s"]["median"] / batch
            found["share_of_bandwidth"] = steps_per_s * size / bandwidth
        candidates[worker.name] = found
    described: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "batch": batch,
        "new_tokens": new_tokens,
        "candidates": candidates,
    }
    if len(workers) > 1:
        described["ratios"] = {
            worker.name: ratios([(one_round[0], one_round[index]) for one_round in speeds])
            for index, worker in enumerate(workers)
            if index
        }
        described["same_tokens"] = {
            worker.name: same_tokens([(one_round[0], one_round[index]) for one_round in rounds])
            for index, worker in enumerate(workers)
            if index
        }
    return described


def speed(
    measured: dict[str, Any], batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """Seconds as tokens per second of the whole batch."""
    first_s = measured["time_to_first_token_s"]
    return {
        "time_to_first_token_s": first_s,
        "prefill_tokens_per_s": batch * prompt_tokens / first_s,
        "decode_tokens_per_s": batch * new_tokens / measured["decode_s"],
        "busy_processors": measured["busy_processors"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One candidate's rounds."""
    found: dict[str, Any] = {key: spread([one[key] for one in rounds]) for key in SPREADS}
    found["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in rounds)
    return found


def ratios(pairs: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """How many times faster (or smaller) than the peer; above 1 is better than the peer."""
    ours, theirs = (
        max(one["peak_memory_bytes"] for one in side) for side in zip(*pairs, strict=True)
    )
    found: dict[str, Any] = {
        name: spread([our[key] / their[key] for our, their in pairs])
        for name, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s"))
    }
    return found | {"memory": theirs / ours}


def same_tokens(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """The share of rows in which both candidates chose the same tokens throughout."""
    equal = [
        our_row == their_row
        for ours, theirs in pairs
        for our_row, their_row in zip(ours["tokens"], theirs["tokens"], strict=True)
    ]
    return statistics.fmean(equal)


# A benchmark's report as lines of text.

Report = Mapping[str, Any]


def table_lines(report: Report) -> Iterator[str]:
    """What ``gemma3-export bench`` prints."""
    machine, options = report["machine"], report["options"]
    speed = machine["read_bytes_per_s"]
    yield (
        f"{machine['processor']}, {machine['processors']} processors, {machine['system']}, "
        f"load {machine['load_average']:.1f}; {machine['device']} memory is read at "
        + (f"{scaled(speed, 1e-9, 1)} GB/s" if speed else "an unknown speed")
    )
    if speed is None:
        yield f"share of its limit: unknown, {machine['read_bytes_missing']}"
    yield f"{options['threads']} threads; median (least to greatest) of {options['repeat']}"
    yield ""
    for name, candidate in report["candidates"].items():
        facts = candidate["describe"]
        details = (f"{key} {value}" for key, value in facts.items() if key != "runtime")
        yield f"{name}: {', '.join(details)}"
    yield ""
    yield from aligned(candidate_rows(report))
    for case in report["cases"]:
        yield ""
        yield (
            f"prompt {case['prompt_tokens']}, batch {case['batch']}, "
            f"{case['new_tokens']} new tokens"
        )
        yield from aligned(speed_rows(case))
        yield from ratio_lines(case)


def candidate_rows(report: Report) -> Iterator[list[str]]:
    """Load time, its memory, and quality where it was measured."""
    quality = report.get("quality")
    yield [
        "",
        "import s",
        "load s",
        "GB peak",
        *(["mean KLD", "same top-1", "perplexity"] if quality else []),
    ]
    for name, facts in report["candidates"].items():
        row = [
            name,
            f"{facts['import_s']:.2f}",
            f"{facts['load_s']:.2f}",
            f"{facts['load_peak_memory_bytes'] / 1e9:.2f}",
        ]
        if quality:
            found = quality[name]
            row += [
                f"{found['mean_kld']:.2g}",
                f"{found['top1_agreement']:.1%}",
                f"{found['perplexity_ratio']:.3f} x",
            ]
        yield row


def speed_rows(case: Report) -> Iterator[list[str]]:
    """One row a candidate."""
    yield [
        "",
        "first token s",
        "prefill tokens/s",
        "decode tokens/s",
        "of limit",
        "GB peak",
        "busy",
    ]
    for name, found in case["candidates"].items():
        share = found.get("share_of_bandwidth")
        yield [
            name,
            scaled(found["time_to_first_token_s"], 1, 3),
            scaled(found["prefill_tokens_per_s"], 1, 1),
            scaled(found["decode_tokens_per_s"], 1, 1),
            "" if share is None else f"{share:.0%}",
            f"{found['peak_memory_bytes'] / 1e9:.2f}",
            f"{found['busy_processors']['median']:.1f}",
        ]


def ratio_lines(case: Report) -> Iterator[str]:
    """The first candidate against each of the others."""
    ours = next(iter(case["candidates"]))
    for peer, found in case.get("ratios", {}).items():
        yield (
            f"  {ours} against {peer}: prefill {scaled(found['prefill'], 1, 2)} x, "
            f"decode {scaled(found['decode'], 1, 2)} x, memory {found['memory']:.2f} x, "
            f"rows with the same tokens {case['same_tokens'][peer]:.0%}"
        )


def aligned(rows: Iterator[list[str]]) -> Iterator[str]:
    """Columns side by side, the first to the left and the others to the right."""
    known = list(rows)
    widths = [max(len(row[index]) for row in known) for index in range(len(known[0]))]
    for row in known:
        cells: Sequence[str] = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def scaled(values: Mapping[str, float], factor: float, digits: int) -> str:
    """Median and range."""
    median, low, high = (f"{values[key] * factor:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


# A benchmark's speeds as an SVG image of its own.

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
