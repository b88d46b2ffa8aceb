"""A benchmark's report as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["table_lines"]

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
