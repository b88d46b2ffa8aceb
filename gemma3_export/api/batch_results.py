"""The results of an unfinished batch: a file beside the output that the next run continues.

    .OUT.partial/results.jsonl    a header, then one line per finished row, in order of completion
    .OUT.partial/sorted.jsonl     the same lines in order of the input, which becomes OUT
    .OUT.partial/table            the same as CSV or Parquet, if OUT is one

A line is complete if it ends with a newline. What a killed process left after the last newline is
cut off, so no line is lost, and none is written twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from gemma3_export.api.batch_files import file_format, write_table
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.records import to_record
from gemma3_export.signals import uninterrupted

__all__ = ["BatchHeader", "UnfinishedResults"]

RESULTS, SORTED, TABLE = "results.jsonl", "sorted.jsonl", "table"
FORMAT_VERSION = 1
WORDS = {
    "input_sha256": "another input",
    "bundle_sha256": "another bundle",
    "options": "other options",
    "seed": "another seed",
}


@dataclass(frozen=True, kw_only=True)
class BatchHeader:
    """What decides the results: a run with another header cannot continue them."""

    input_sha256: str
    bundle_sha256: str
    options: dict[str, Any]
    seed: int | None  # None if greedy
    format_version: int = FORMAT_VERSION

    def difference(self, other: BatchHeader) -> str | None:
        """Return what differs in ``other``, in words; None if nothing does."""
        changed = [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if not changed:
            return None
        if changed[0] == "options":
            names = sorted({*self.options, *other.options})
            return ", ".join(
                f"{name} was {self.options.get(name)!r:.60} and is {other.options.get(name)!r:.60}"
                for name in names
                if self.options.get(name) != other.options.get(name)
            )
        name = changed[0]
        if name == "seed":
            return f"seed was {self.seed} and is {other.seed}"
        return WORDS.get(name, f"another {name}")


class UnfinishedResults:
    """The results so far, on disk; use it as a context manager.

    Args:
        folder: where the files are; the caller holds its lock.
        target: the output.
        header: of this run. Its seed may be one that was drawn for this run.
        is_seed_given: whether the header's seed must be that of the earlier run; otherwise the
            earlier one is used.
        rows: how many rows the input has.
        restart: discard the results of an earlier run.

    Raises:
        InputError: the results of an earlier run are of another input, bundle or options, or are
            damaged.
    """

    def __init__(
        self,
        folder: Path,
        target: Path,
        header: BatchHeader,
        *,
        is_seed_given: bool,
        rows: int,
        restart: bool,
    ) -> None:
        self.path, self._target, self._rows = folder / RESULTS, target, rows
        self._places: dict[int, tuple[int, int]] = {}  # offset and length of each row's line
        self.header = header
        if restart:
            self.path.unlink(missing_ok=True)
        self._end = 0
        if self.path.exists():
            self._read(header, is_seed_given=is_seed_given)
        self._file = self.path.open("r+b" if self._end else "w+b", buffering=0)
        self._file.truncate(self._end)
        self._file.seek(self._end)
        if not self._end:
            self._append(asdict(self.header))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, index: int, result: Mapping[str, Any]) -> None:
        """Store the result of a row.

        Raises:
            Gemma3ExportError: it cannot be written.
        """
        assert index not in self._places
        self._places[index] = self._append({"index": index, **result})

    def flush_to_disk(self) -> None:
        """Let the results survive a loss of power."""
        os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Write all results in the order of the rows to the target, and remove the files here.

        The ending of the target's name decides whether they become JSONL or a table.

        Raises:
            Gemma3ExportError: they cannot be written; they are kept for another try.
        """
        assert len(self) == self._rows
        ordered = self.path.with_name(SORTED)
        try:
            with ordered.open("wb") as file:
                for index in range(self._rows):
                    offset, length = self._places[index]
                    self._file.seek(offset)
                    file.write(self._file.read(length))
                file.flush()
                os.fsync(file.fileno())
            if (kind := file_format(self._target)) != "jsonl":
                table = self.path.with_name(TABLE)
                write_table(ordered, table, kind)
                table.replace(ordered)
            with uninterrupted():
                ordered.replace(self._target)
                self._file.close()  # Windows removes no open file
                self.path.unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    def _append(self, data: Mapping[str, Any]) -> tuple[int, int]:
        """Append one line; return its offset and length."""
        line = json.dumps(data, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        offset = self._end
        try:
            with uninterrupted():
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
                self._end += len(line)
        except OSError as error:
            raise self._unwritable(error) from error
        return offset, len(line)

    def _unwritable(self, error: OSError) -> Gemma3ExportError:
        return Gemma3ExportError(
            f"writing the results of {self._target} failed: {error}; the finished rows are kept, "
            "so free some disk space and run the same command again"
        )

    def _read(self, header: BatchHeader, *, is_seed_given: bool) -> None:
        """Read what an earlier run finished, and set ``_end`` to the end of its last whole line."""
        with self.path.open("rb") as file:
            first = file.readline()
            if not first.endswith(b"\n"):  # killed before the first row
                return
            found = self._header_of(first)
            if found.seed is not None and header.seed is not None and not is_seed_given:
                header = BatchHeader(**asdict(header) | {"seed": found.seed})
            if difference := found.difference(header):
                raise InputError(
                    f"{self._target} is unfinished, and its finished rows are of another run "
                    f"({difference}); run the same command as before to finish it, pass --restart "
                    "to discard them, or choose another output"
                )
            self.header = header
            self._end = len(first)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                index = self._index_of(line)
                self._places[index] = (self._end, len(line))
                self._end += len(line)

    def _header_of(self, line: bytes) -> BatchHeader:
        try:
            data = json.loads(line)
        except ValueError as error:
            raise self._damaged() from error
        return to_record(
            data, BatchHeader, where=str(self.path), remedy="pass --restart to begin again"
        )

    def _index_of(self, line: bytes) -> int:
        try:
            index = json.loads(line)["index"]
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged() from error
        if type(index) is not int or not 0 <= index < self._rows or index in self._places:
            raise self._damaged()
        return index

    def _damaged(self) -> InputError:
        return InputError(f"{self.path} is damaged; pass --restart to begin again")
