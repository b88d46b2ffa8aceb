"""The rule that every case must obey.

Exit 0 with a right result; or 1, 2, 3, 129, 130 or 143 with exactly one line of error. Within the
limits of time and memory, without a traceback, and with nothing else at the output.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from tests.faults.harness.children import Finished

ERROR_CODES = {1, 2, 3}
SIGNAL_CODES = {129, 130, 143}
MAX_ERROR_CHARACTERS = 4000
# Lines of stderr besides the error: progress, warnings, usage and reports of training.
BESIDE_ERROR = re.compile(
    r".* \.\.\.$|warning: .*|Usage: .*|Try '.*|$|removed .* of partial output .*|restored .*"
)

RIGHT = "right"
REJECTED = "rejected"
FAILED = "failed"
UNAVAILABLE = "unavailable"
INTERRUPTED = "interrupted"
NAMES = {0: RIGHT, 1: FAILED, 2: REJECTED, 3: UNAVAILABLE} | dict.fromkeys(
    SIGNAL_CODES, INTERRUPTED
)


@dataclass(frozen=True)
class Verdict:
    """The kind of an outcome, and what breaks the rule, if anything does."""

    kind: str
    complaint: str = ""

    @property
    def is_good(self) -> bool:
        """Return whether the rule holds."""
        return not self.complaint


@dataclass(frozen=True)
class Snapshot:
    """The content of a folder: names, and the size, time and inode of files."""

    entries: frozenset[tuple[object, ...]]

    @classmethod
    def of(cls, folder: Path) -> Snapshot:
        """Take a snapshot of ``folder``, not following symbolic links."""
        found: set[tuple[object, ...]] = set()
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = Path(parent, name)
                status = path.lstat()
                is_folder = name in folders
                facts = () if is_folder else (status.st_size, status.st_mtime_ns, status.st_ino)
                found.add((str(path.relative_to(folder)), status.st_mode, *facts))
        return cls(frozenset(found))

    def changes_to(self, other: Snapshot) -> str:
        """Describe what differs, empty if nothing does."""
        names = sorted({str(entry[0]) for entry in self.entries ^ other.entries})
        return ", ".join(names[:5])


def verdict_of_ending(finished: Finished, *, codes: set[int] = ERROR_CODES | {0}) -> Verdict:
    """Judge how a child ended, but not what it produced."""
    kind = NAMES.get(finished.code, f"exit {finished.code}")
    if finished.is_late:
        return Verdict("too slow", "it did not end in time")
    if finished.code < 0:
        return Verdict("crash", f"it died of signal {-finished.code}")
    if "Traceback (most recent call last)" in finished.stderr:
        last = finished.stderr.strip().splitlines()[-1]
        return Verdict("traceback", f"it ended with a traceback: {last[:300]}")
    if finished.code not in codes:
        return Verdict(kind, f"it exited with {finished.code}")
    if finished.code in ERROR_CODES:
        return Verdict(kind, _complaint_about_message(finished.stderr))
    return Verdict(kind)


def _complaint_about_message(stderr: str) -> str:
    lines = stderr.removesuffix("\n").split("\n")
    errors = [line for line in lines if line.startswith(("error: ", "Error: "))]
    if len(errors) != 1:
        return f"{len(errors)} lines of error instead of one"
    others = [line for line in lines if line not in errors and not BESIDE_ERROR.fullmatch(line)]
    if others:
        return f"more than one line: {others[0][:200]!r}"
    (line,) = errors
    if lines[-1] != line:
        return "the error is not the last line"
    if len(line) > MAX_ERROR_CHARACTERS:
        return f"an error of {len(line)} characters"
    if any(unicodedata.category(character) == "Cc" for character in line):
        return f"control characters in the error: {line[:200]!r}"
    return ""
