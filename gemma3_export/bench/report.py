"""Report a benchmark: its rounds as medians and ratios, a table for the terminal, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

from gemma3_export.bench.process import Worker
from gemma3_export.processor_kind import Processor

__all__ = [
    "aligned",
    "describe_case",
    "ratios",
    "scaled",
    "speed_plot",
    "spread",
    "table_lines",
]

Report = Mapping[str, Any]
Value = TypeVar("Value")
SPREADS = (
    "time_to_first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "busy_processors",
)


# Rounds as medians, ranges and ratios


def describe_case(
    workers: Sequence[Worker],
    case: tuple[int, int],
    rounds: Sequence[Sequence[dict[str, Any]]],
    new_tokens: int,
    bandwidth: float | None,
) -> dict[str, Any]:
    """Return the speeds of all candidates, and the first one's ratios to each of the others.

    Args:
        workers: the candidates.
        case: prompt tokens and batch.
        rounds: for each round, each candidate's measurement.
        new_tokens: decoded after each prompt.
        bandwidth: of the memory that has the weights, in bytes per second.
    """
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
        described["ratios"] = with_each_peer(workers, speeds, ratios)
        described["same_tokens"] = with_each_peer(workers, rounds, same_tokens)
    return described


def with_each_peer(
    workers: Sequence[Worker],
    rounds: Sequence[Sequence[dict[str, Any]]],
    compare: Callable[[Sequence[tuple[dict[str, Any], dict[str, Any]]]], Value],
) -> dict[str, Value]:
    """Compare the first candidate's rounds with those of each other candidate, by its name."""
    return {
        worker.name: compare([(one_round[0], one_round[index]) for one_round in rounds])
        for index, worker in enumerate(workers)
        if index
    }


def speed(
    measured: dict[str, Any], batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """Convert a measurement's seconds into tokens per second of the whole batch."""
    first_s = measured["time_to_first_token_s"]
    return {
        "time_to_first_token_s": first_s,
        "prefill_tokens_per_s": batch * prompt_tokens / first_s,
        "decode_tokens_per_s": batch * new_tokens / measured["decode_s"],
        "busy_processors": measured["busy_processors"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Summarize the rounds of one candidate."""
    found: dict[str, Any] = {key: spread([one[key] for one in rounds]) for key in SPREADS}
    found["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in rounds)
    return found


def ratios(pairs: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Return how many times faster (or smaller) than a peer the first candidate is.

    Args:
        pairs: our speeds and the peer's, for each round.
    """
    ours, theirs = (
        max(one["peak_memory_bytes"] for one in side) for side in zip(*pairs, strict=True)
    )
    found: dict[str, Any] = {
        name: spread([our[key] / their[key] for our, their in pairs])
        for name, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s"))
    }
    return found | {"memory": theirs / ours}


def same_tokens(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Return the share of rows for which both candidates chose exactly the same tokens."""
    equal = [
        our_row == their_row
        for ours, theirs in pairs
        for our_row, their_row in zip(ours["tokens"], theirs["tokens"], strict=True)
    ]
    return statistics.fmean(equal)


# The table for the terminal


def table_lines(report: Report) -> Iterator[str]:
    """Yield the lines that ``gemma3-export bench`` prints."""
    machine, options = report["machine"], report["options"]
    bandwidth = machine["read_bytes_per_s"]
    yield (
        f"{Processor(**machine['processor'])}, {machine['processors']} processors, "
        f"{machine['system']}, huge pages {machine['huge_pages'] or 'unknown'}, "
        f"load {machine['load_average']:.1f}; {machine['device']} memory bandwidth "
        + (f"{scaled(bandwidth, 1e-9, 1)} GB/s" if bandwidth else "unknown")
    )
    if bandwidth is None:
        yield f"share of the limit: unknown, because {machine['read_bytes_missing']}"
    yield f"{options['threads']} threads; median (min to max) of {options['repeat']}"
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
    """Yield each candidate's load time, peak memory, and quality if it was measured."""
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
    """Yield one row per candidate."""
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
    """Yield one line per peer that compares the first candidate with it."""
    ours = next(iter(case["candidates"]))
    for peer, found in case.get("ratios", {}).items():
        yield (
            f"  {ours} against {peer}: prefill {scaled(found['prefill'], 1, 2)} x, "
            f"decode {scaled(found['decode'], 1, 2)} x, memory {found['memory']:.2f} x, "
            f"rows with the same tokens {case['same_tokens'][peer]:.0%}"
        )


def aligned(rows: Iterator[list[str]]) -> Iterator[str]:
    """Pad the cells into columns, the first left-aligned and the others right-aligned."""
    known = list(rows)
    widths = [max(len(row[index]) for row in known) for index in range(len(known[0]))]
    for row in known:
        cells: Sequence[str] = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def scaled(values: Mapping[str, float], factor: float, digits: int) -> str:
    """Format a median and its range."""
    median, low, high = (f"{values[key] * factor:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


# The plot

WIDTH, NAMES, BARS, VALUES = 860, 170, 200, 70
ROW, TITLE, GAP = 22, 44, 18
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}"
    ".small{font-size:11px;fill:#57606a}.ours{fill:#1f6feb}.peer{fill:#9aa7b4}"
    ".spread{stroke:#24292f;stroke-width:1.2}"
)
COLUMNS = (("prefill_tokens_per_s", "prefill"), ("decode_tokens_per_s", "decode"))


def speed_plot(report: Report) -> str:
    """Draw the speeds of each case as an SVG image: bars for medians, lines from min to max.

    Args:
        report: from :func:`gemma3_export.bench.run.run_benchmark`.
    """
    parts: list[str] = []
    top = 8
    for case in report["cases"]:
        parts += case_parts(case, top)
        top += TITLE + ROW * len(case["candidates"]) + GAP
    machine, options = report["machine"], report["options"]
    note = (
        f"{Processor(**machine['processor'])}, {options['threads']} threads; "
        f"bars are medians of {options['repeat']}, lines span min to max"
    )
    parts.append(f'<text class="small" x="8" y="{top + 4}">{escape(note)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 16}" '
        f'width="{WIDTH}" height="{top + 16}" role="img" aria-label="Speeds">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def case_parts(case: Report, top: int) -> Iterator[str]:
    """Draw the title and the rows of one case."""
    title = f"prompt {case['prompt_tokens']}, batch {case['batch']}"
    yield f'<text class="title" x="8" y="{top + 14}">{title}</text>'
    names = list(case["candidates"])
    for index, name in enumerate(names):
        y = top + TITLE + index * ROW
        yield f'<text x="{NAMES - 10}" y="{y + 5}" text-anchor="end">{escape(name)}</text>'
    for column, (key, label) in enumerate(COLUMNS):
        left = NAMES + column * (BARS + VALUES + 60)
        yield f'<text class="small" x="{left}" y="{top + 28}">{label}, tokens/s</text>'
        largest = max(case["candidates"][name][key]["max"] for name in names)
        for index, name in enumerate(names):
            style = "peer" if index else "ours"
            position = (left, top + TITLE + index * ROW)
            yield from bar(case["candidates"][name][key], largest, position, style)


def bar(
    values: Mapping[str, float], largest: float, position: tuple[int, int], style: str
) -> Iterator[str]:
    """Draw a median's bar, its range and its number."""
    left, y = position
    median, low, high = (values[key] / largest * BARS for key in ("median", "min", "max"))
    yield f'<rect class="{style}" x="{left}" y="{y - 6}" width="{median:.1f}" height="13" rx="2"/>'
    yield (
        f'<path class="spread" d="M{left + low:.1f} {y}H{left + high:.1f}'
        f'M{left + low:.1f} {y - 3}v6M{left + high:.1f} {y - 3}v6"/>'
    )
    yield f'<text x="{left + BARS + 8}" y="{y + 5}">{values["median"]:.1f}</text>'
