"""Make a case from its format and seed, run it, and judge what it left.

A case lives in a folder of its own: the hostile input in ``in``, the output expected at ``out``,
both in the current folder of the command, which must contain nothing else in the end.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.harness import children
from tests.faults.harness.outcomes import RIGHT, Snapshot, Verdict, verdict_of_ending

INPUT, OUTPUT = "in", "out"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input, the command that reads it, and how to tell a right result.

    Args:
        name: the changes that made the input hostile.
        arguments: of the command line.
        check: called with the case's folder and what the command printed, in a child, after exit
            0; returns what is wrong, or None.
        stdin: what the command reads.
        has_output: the command writes ``out`` if it succeeds.
        had_output: ``out`` is there before, and stays whatever happens.
        is_checked_here: call ``check`` in this process, because it starts children of its own.
        must_succeed: the change does no harm, so that an error is wrong.
    """

    name: str
    arguments: list[str]
    check: Callable[[Path, str], str | None]
    stdin: bytes = b""
    has_output: bool = True
    had_output: bool = False
    is_checked_here: bool = False
    must_succeed: bool = False


Generator = Callable[[Path, random.Random], Case]


@dataclass(frozen=True)
class Result:
    """A case that was run."""

    generator: str
    seed: int
    name: str
    verdict: Verdict
    details: str = field(default="", repr=False)

    @property
    def replay(self) -> str:
        """Return the command that runs the case again."""
        return f"{sys.executable} -m tests.faults.harness --replay {self.generator}:{self.seed}"

    def __str__(self) -> str:
        return (
            f"{self.generator}:{self.seed} ({self.name}): {self.verdict.complaint}\n"
            f"  replay: {self.replay}\n  " + self.details.strip().replace("\n", "\n  ")
        )


def run_case(generator: str, make: Generator, seed: int, folder: Path) -> Result:
    """Make the case of ``seed`` in ``folder``, run it and judge it."""
    place = folder / "place"
    (place / INPUT).mkdir(parents=True)
    case = make(place / INPUT, random.Random(f"{generator}:{seed}"))
    before = Snapshot.of(place / INPUT)
    finished = children.run(case.arguments, place, stdin=case.stdin)
    verdict = verdict_of_ending(finished)
    details = f"$ gemma3-export {' '.join(case.arguments)}\n{finished}"
    if verdict.is_good:
        verdict = _judge_what_is_left(case, place, before, verdict)
    if verdict.is_good and verdict.kind != RIGHT and case.must_succeed:
        verdict = Verdict("rejected, but valid", "a harmless change made it fail")
    if verdict.is_good and verdict.kind == RIGHT:
        complaint = _complaint(case, place, finished.stdout)
        if complaint:
            verdict = Verdict("wrong result", f"exit 0, but {complaint[:2000]}")
    return Result(generator, seed, case.name, verdict, details)


def _complaint(case: Case, place: Path, printed: str) -> str:
    if case.is_checked_here:
        return case.check(place, printed) or ""
    checked = children.call(case.check, place, printed, folder=place)
    return f"the check failed: {checked.stderr[-1500:]}" if checked.code else checked.stdout.strip()


def _judge_what_is_left(case: Case, place: Path, before: Snapshot, verdict: Verdict) -> Verdict:
    has_output = case.had_output or (case.has_output and verdict.kind == RIGHT)
    expected = {INPUT, OUTPUT} if has_output else {INPUT}
    found = {path.name for path in place.iterdir()}
    if "canary" in found:
        return Verdict("code ran", "code in the input was executed")
    if found != expected:
        return Verdict("leftovers", f"the folder has {sorted(found)}, not {sorted(expected)}")
    if changes := before.changes_to(Snapshot.of(place / INPUT)):
        return Verdict("input changed", f"it changed its input: {changes}")
    return verdict
