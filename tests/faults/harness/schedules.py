"""What happens to a command at the n-th change of its output folder, or some time after its start.

A change is a file that is opened for writing, renamed, linked or removed, or a folder that is made
or removed. Python reports them to audit hooks, so that a kill can hit every moment between two.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults.harness import children
from tests.faults.harness.cases import INPUT, OUTPUT, Result
from tests.faults.harness.children import Finished
from tests.faults.harness.commands import (
    COMMANDS,
    Command,
    clean_digest,
    complaint_about_output,
    digest,
    prepared_place,
    with_old_output,
)
from tests.faults.harness.outcomes import ERROR_CODES, Verdict, verdict_of_ending

CHANGES = {"os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
COUNTS = "counts"
THESIS = "years of work"


@dataclass(frozen=True)
class AtChange:
    """Act at the n-th change below the current folder; called in the child.

    Args:
        number: of the change before which to act, from 1; 0 never acts.
        action: ``SIGKILL``, another signal, or ``appear``: a foreign file appears in the output.
        log: a file that gets one byte per change.
    """

    number: int
    action: str
    log: str

    def __call__(self) -> None:
        """Install the hook."""
        here = str(Path.cwd())
        counter = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        count = 0
        is_busy = False

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count, is_busy
            if is_busy or not _is_change(event, arguments, here):
                return
            is_busy = True
            try:
                count += 1
                os.write(counter, b".")
                if count == self.number:
                    self._act(Path(here))
            finally:
                is_busy = False

        sys.addaudithook(hook)

    def _act(self, place: Path) -> None:
        if self.action == "appear":
            appear(place)
        else:
            os.kill(os.getpid(), getattr(signal, self.action))


def appear(place: Path) -> None:
    """Make a foreign file in the output folder."""
    (place / OUTPUT).mkdir(exist_ok=True)
    (place / OUTPUT / "thesis.txt").write_text(THESIS)


def _is_change(event: str, arguments: tuple[Any, ...], here: str) -> bool:
    if event == "ctypes.dlsym":
        return arguments[1] == "renameat2"
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in CHANGES:
        path = arguments[0]
    else:
        return False
    if isinstance(path, int) or path is None:
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(here + os.sep)  # noqa: PTH100


@cache
def _changes_of_clean_run(name: str) -> tuple[int, float]:
    """Return how often a run changes its place, and how many seconds it takes."""
    with prepared_place() as place, children.scratch_folder() as logs:
        log = logs / COUNTS
        started = time.monotonic()
        finished = children.run(
            COMMANDS[name].to(OUTPUT), place, before=AtChange(0, "SIGKILL", str(log))
        )
        assert finished.code == 0, finished
        return log.stat().st_size, time.monotonic() - started


def kill_case(seed: int, folder: Path) -> Result:
    """Kill a command at any moment; the next run must succeed and leave nothing else."""
    del folder
    rng = random.Random(f"kill:{seed}")
    name = rng.choice(list(COMMANDS))
    command, is_replacing = COMMANDS[name], rng.random() < 0.4
    changes, seconds = _changes_of_clean_run(name)
    number = rng.choice((0, *[rng.randrange(1, changes + 3)] * 4))
    delay_s = rng.uniform(0, seconds)
    with prepared_place() as place, children.scratch_folder() as logs:
        if is_replacing:
            with_old_output(name, place)
        old = digest(place / OUTPUT)
        hook = AtChange(number, "SIGKILL", str(logs / COUNTS))
        child = children.start(command.to(OUTPUT, force=is_replacing), place, before=hook)
        if not number:
            time.sleep(delay_s)
            child.send(signal.SIGKILL)
        finished = child.wait()
        when = f"change {number} of {changes}" if number else f"{delay_s:.2f} of {seconds:.2f} s"
        case = f"{name}{' --force' if is_replacing else ''} killed at {when}"
        verdict = Verdict("killed")
        if finished.code not in (0, -signal.SIGKILL):
            verdict = Verdict("crash", f"it exited with {finished.code}")
        elif is_replacing:
            verdict = _judge_replacement(name, place, old, verdict)
        details = str(finished)
        if verdict.is_good:
            verdict, again = _judge_next_run(name, command, place)
            details += f"\nnext run: {again}"
        return Result("kill", seed, case, verdict, details)


def _judge_replacement(name: str, place: Path, old: dict[str, str], good: Verdict) -> Verdict:
    """Check that the old output or the new one is there, complete, or can be restored."""
    outputs = [place / OUTPUT, *place.glob(f".{OUTPUT}.*"), *place.glob(f".{OUTPUT}.*/*")]
    found = [digest(output) for output in outputs if output.is_dir()]
    if old in found or clean_digest(name) in found:
        return good
    return Verdict("lost", "neither the old output nor the new one is there")


def _judge_next_run(name: str, command: Command, place: Path) -> tuple[Verdict, Finished]:
    """Run the command again after a kill, and check that it succeeds and cleans up."""
    is_there = (place / OUTPUT).exists()
    arguments = command.to(OUTPUT, force=is_there)
    if command.resume and any((place / OUTPUT / "checkpoints").glob("step-*.json")):
        record = place / OUTPUT / "training.json"
        if record.is_file() and '"seed": 5' not in record.read_text():
            arguments = list(command.resume)
    finished = children.run(arguments, place)
    if finished.code == 0 and (found := digest(place / OUTPUT)) != clean_digest(name):
        differing = sorted(found.items() ^ clean_digest(name).items())[:2]
        return Verdict(
            "wrong result", f"after the next run, the output differs: {differing}"
        ), finished
    if finished.code != 0:
        complaint = f"`{' '.join(arguments)}` exits with {finished.code} after a kill"
        return Verdict("stuck", complaint), finished
    return _judge_entries(place, {INPUT, OUTPUT}, Verdict("recovered")), finished


def _judge_entries(place: Path, expected: set[str], good: Verdict) -> Verdict:
    found = {path.name for path in place.iterdir()}
    if found != expected:
        return Verdict("leftovers", f"the folder has {sorted(found)}, not {sorted(expected)}")
    partial = [path.name for path in (place / OUTPUT).rglob(".*.partial")]
    if partial:
        return Verdict("leftovers", f"the output has {partial}")
    if (place / OUTPUT).is_dir() and (complaint := complaint_about_output(place / OUTPUT)):
        return Verdict("wrong result", complaint)
    return good


def signal_case(seed: int, folder: Path) -> Result:
    """Send a signal at any moment; the exit code tells it, and nothing is left behind."""
    del folder
    rng = random.Random(f"signal:{seed}")
    name, action = rng.choice(list(COMMANDS)), rng.choice(list(SIGNALS))
    command, is_replacing = COMMANDS[name], rng.random() < 0.3
    changes, _ = _changes_of_clean_run(name)
    number = rng.randrange(1, changes + 1)
    with prepared_place() as place, children.scratch_folder() as logs:
        if is_replacing:
            with_old_output(name, place)
        old = digest(place / OUTPUT)
        hook = AtChange(number, action, str(logs / COUNTS))
        finished = children.run(command.to(OUTPUT, force=is_replacing), place, before=hook)
        case = (
            f"{name}{' --force' if is_replacing else ''}: {action} at change {number} of {changes}"
        )
        verdict = verdict_of_ending(finished, codes={0, 128 + SIGNALS[action]})
        details = str(finished)
        if verdict.is_good:
            verdict = _judge_interrupted(name, command, place, finished, old, verdict)
        if verdict.is_good and name in ("train", "data"):
            after, again = _judge_next_run(name, command, place)
            verdict = verdict if after.is_good else after
            details += f"\nnext run: {again}"
        return Result("signal", seed, case, verdict, details)


def _judge_interrupted(
    name: str,
    command: Command,
    place: Path,
    finished: Finished,
    old: dict[str, str],
    verdict: Verdict,
) -> Verdict:
    found = {path.name for path in place.iterdir()}
    expected = {INPUT, OUTPUT} if finished.code == 0 or old else {INPUT}
    if finished.code != 0:
        expected |= found & command.keeps
        # A signal may arrive when the output has just got its name.
        is_complete = digest(place / OUTPUT) == clean_digest(name)
        expected |= found & {OUTPUT} if is_complete else set()
    verdict = _judge_entries(place, expected, verdict)
    if not verdict.is_good or name == "train":
        return verdict
    now = digest(place / OUTPUT)
    if now and now not in (old, clean_digest(name)):
        return Verdict("wrong result", "the output is neither the old one nor the new one")
    return verdict


def appearing_case(seed: int, folder: Path) -> Result:
    """Let a foreign file appear in the output at any moment; it must be there in the end."""
    del folder
    rng = random.Random(f"appear:{seed}")
    name = rng.choice(list(COMMANDS))
    changes, _ = _changes_of_clean_run(name)
    number, is_forced = rng.randrange(1, changes + 1), rng.random() < 0.5
    with prepared_place() as place, children.scratch_folder() as logs:
        if is_forced and rng.random() < 0.5:
            with_old_output(name, place)
        had_output = (place / OUTPUT).exists()
        old = digest(place / OUTPUT)
        hook = AtChange(number, "appear", str(logs / COUNTS))
        finished = children.run(COMMANDS[name].to(OUTPUT, force=is_forced), place, before=hook)
        option = " --force" if is_forced else ""
        case = f"{name}{option}: a file appears at change {number} of {changes}"
        verdict = verdict_of_ending(finished)
        found = {path.name for path in place.iterdir()}
        thesis = place / OUTPUT / "thesis.txt"
        if verdict.is_good and (logs / COUNTS).stat().st_size >= number:
            if not thesis.is_file() or thesis.read_text() != THESIS:
                verdict = Verdict("lost", "the file that appeared is gone")
            elif finished.code != 0 and had_output and digest(place / OUTPUT).keys() < old.keys():
                verdict = Verdict("lost", "the old output is gone")
            elif found - COMMANDS[name].keeps != {INPUT, OUTPUT} - COMMANDS[name].keeps:
                verdict = Verdict("leftovers", f"the folder has {sorted(found)}")
        return Result("appear", seed, case, verdict, str(finished))


def race_case(seed: int, folder: Path) -> Result:
    """Start several commands that write the same output; one wins, the others say why not."""
    del folder
    rng = random.Random(f"race:{seed}")
    kinds = [rng.choice(list(COMMANDS))]
    kinds = (
        kinds * rng.choice((2, 3, 4)) if rng.random() < 0.7 else rng.choices(list(COMMANDS), k=3)
    )
    is_forced = rng.random() < 0.3
    with prepared_place() as place:
        running = []
        for name in kinds:
            running.append(children.start(COMMANDS[name].to(OUTPUT, force=is_forced), place))
            time.sleep(rng.choice((0, 0, 0.05, 0.3)))
        finished = [child.wait() for child in running]
        case = f"{', '.join(kinds)}{' --force' if is_forced else ''} at once"
        verdict = _judge_race(kinds, finished, place, is_forced)
        return Result("race", seed, case, verdict, "\n".join(map(str, finished)))


def _judge_race(
    kinds: list[str], finished: list[Finished], place: Path, is_forced: bool
) -> Verdict:
    for one in finished:
        verdict = verdict_of_ending(one, codes=ERROR_CODES | {0})
        if not verdict.is_good:
            return verdict
    winners = [name for name, one in zip(kinds, finished, strict=True) if one.code == 0]
    if not winners or (len(winners) > 1 and not is_forced):
        return Verdict("race", f"{len(winners)} of {len(kinds)} succeeded")
    verdict = _judge_entries(place, {INPUT, OUTPUT}, Verdict("one won"))
    if verdict.is_good and digest(place / OUTPUT) not in map(clean_digest, winners):
        return Verdict("wrong result", "the output is not that of a run that succeeded")
    return verdict


SCHEDULES: dict[str, Callable[[int, Path], Result]] = {
    "kill": kill_case,
    "signal": signal_case,
    "appear": appearing_case,
    "race": race_case,
}
