"""Run thousands of hostile cases for a given time, and print a table of outcomes.

    python -m tests.faults.harness --time 600 --seed 1
    python -m tests.faults.harness --replay gguf:1234 --keep folder

A case that breaks the rule is printed with the command that replays it. The exit code is then 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from pathlib import Path

from tests.faults.harness.cases import Result
from tests.faults.harness.children import scratch_folder
from tests.faults.harness.generators import KINDS
from tests.faults.harness.outcomes import NAMES

SEED_STRIDE = 10_000_000  # cases of one seed of the command


def main() -> int:
    """Parse the arguments, run, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.harness", description=__doc__)
    parser.add_argument("--time", type=float, default=600, help="seconds to run [default: 600]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run [default: 0]")
    parser.add_argument("--only", action="append", choices=KINDS, help="run this kind of case")
    parser.add_argument("--replay", metavar="KIND:SEED", help="run one case and print all about it")
    parser.add_argument("--keep", type=Path, help="with --replay: the folder to run in and keep")
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay, options.keep)
    results = explore(options.only or list(KINDS), options.seed, options.time)
    print(table(results))
    bad = [result for result in results if not result.verdict.is_good]
    if bad:
        print(f"\n{len(bad)} of {len(results)} cases broke the rule; see above", file=sys.stderr)
    return 1 if bad else 0


def explore(kinds: list[str], seed: int, seconds: float) -> list[Result]:
    """Run one case of each kind in turn until the time is over."""
    end, results = time.monotonic() + seconds, []
    for number in itertools.count(seed * SEED_STRIDE):
        for kind in kinds:
            if time.monotonic() > end:
                return results
            with scratch_folder() as folder:
                result = KINDS[kind](number, folder)
            results.append(result)
            if not result.verdict.is_good:
                print(result, flush=True)
    raise AssertionError("the numbers do not end")


def replay(case: str, keep: Path | None) -> int:
    """Run one case again and print everything about it."""
    kind, _, number = case.partition(":")
    with scratch_folder() as folder:
        if keep is not None:
            keep.mkdir(parents=True)
        result = KINDS[kind](int(number), keep or folder)
    print(f"{case} ({result.name}): {result.verdict.kind} {result.verdict.complaint}")
    print(result.details, flush=True)
    return 0 if result.verdict.is_good else 1


def table(results: list[Result]) -> str:
    """Return the number of cases by kind and outcome, the broken ones last."""
    counts = Counter((result.generator, result.verdict.kind) for result in results)
    broken = Counter(result.generator for result in results if not result.verdict.is_good)
    good = list(dict.fromkeys(NAMES.values()))
    others = sorted({kind for _, kind in counts} - set(good))
    columns = [*(name for name in good if any(counts[row, name] for row in KINDS)), *others]
    rows = [["kind", "cases", *columns, "broke the rule"]]
    for kind in dict.fromkeys(result.generator for result in results):
        total = sum(counts[kind, column] for column in columns)
        rows.append([kind, total, *(counts[kind, column] for column in columns), broken[kind]])
    total_row = [sum(int(row[i]) for row in rows[1:]) for i in range(1, len(rows[0]))]
    rows.append(["total", *total_row])
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
