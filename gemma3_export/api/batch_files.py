"""The files of a batch: rows come from JSONL, CSV or Parquet, and results go to one of them.

The ending of a file name decides: ``.csv`` and ``.parquet``, and otherwise JSONL. Generation itself
knows only JSONL. A table is read into a temporary JSONL file of its rows, and results become a
table when all are finished, so an interrupted run continues whatever the formats are.

A table has types that JSON lacks, and lacks nesting (CSV) or mixed types (Parquet):

    CSV        UTF-8, RFC 4180. An empty cell is a missing value. Lists are JSON in a cell.
    Parquet    Lists and structs. A null in a struct is a missing key, since the file has no other
               way to say so. Values of several types (stop_reason, arguments) are JSON in a string.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.tokenizer.json_rows import (
    MAX_LINE_BYTES,
    MEDIA,
    MESSAGES,
    PROMPT,
    SHAREGPT,
    TEXT,
)

if TYPE_CHECKING:
    import pyarrow

__all__ = ["FileFormat", "check_packages", "file_format", "open_rows", "write_table"]

FileFormat = Literal["jsonl", "csv", "parquet"]
ENDINGS: dict[str, FileFormat] = {".csv": "csv", ".parquet": "parquet"}
TOOLS, VARIABLES, ID = "tools", "chat_template_kwargs", "id"
JSON_COLUMNS = (MESSAGES, TOOLS, VARIABLES)  # where a string is the JSON of the value
PROMPTS = (MESSAGES, PROMPT, TEXT, SHAREGPT)
ROWS_AT_ONCE = 256  # rows of a Parquet file that are in memory
# The columns of results in the order of a table, before others; ALWAYS are in every table.
COLUMNS = (
    "index",
    ID,
    "text",
    "finish_reason",
    "stop_reason",
    "is_complete",
    "prompt_tokens",
    "token_ids",
    "seed",
    "logprobs",
    "function_calls",
    "function_calls_error",
    "error",
)
ALWAYS = {"index", "text", "finish_reason", "stop_reason", "prompt_tokens", "token_ids", "seed"}
INT64 = range(-(2**63), 2**63)


def file_format(path: Path) -> FileFormat:
    """Return the format of a file from the ending of its name."""
    return ENDINGS.get(path.suffix.lower(), "jsonl")


def check_packages(*paths: Path) -> None:
    """Check that the packages for these files are installed.

    Raises:
        UnavailableError: pyarrow is missing.
    """
    for path in paths:
        if file_format(path) == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UnavailableError(
                f'{path} needs pyarrow; run: pip install "gemma3-export[batch]", or use JSONL or '
                "CSV"
            )


@contextmanager
def open_rows(
    file: IO[bytes], path: Path, scratch: Path, column: str | None
) -> Iterator[IO[bytes]]:
    """Open the rows of an input as JSONL, in their order.

    Args:
        file: the input.
        path: its name.
        scratch: the folder for a temporary file.
        column: the column of the prompt, None for the usual ones.

    Raises:
        InputError: a table is damaged, has a value that JSON lacks, or has none of the columns.
    """
    kind = file_format(path)
    file.seek(0)
    if kind == "jsonl":
        yield file
        return
    with tempfile.TemporaryFile(dir=scratch) as rows:
        read = _csv_rows if kind == "csv" else _parquet_rows
        for number, row in enumerate(read(file, path, column), 1):
            given = {key: value for key, value in row.items() if value is not None}
            try:
                line = json.dumps(given, allow_nan=False).encode() + b"\n"
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path} row {number} cannot be read: {error}; correct the row"
                ) from error
            rows.write(line)
        rows.seek(0)
        yield rows


def _used(names: Iterable[str], path: Path, column: str | None) -> list[str]:
    """Return the columns to read.

    Raises:
        InputError: two have the same name, or there is none with prompts.
    """
    names = list(names)
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path} has two columns {twice[0]!r:.60}; rename one")
    wanted = (column,) if column is not None else PROMPTS
    if not set(names) & {*wanted, *MEDIA}:
        shown = f"{', '.join(sorted(names)) or 'no columns':.200}"
        what = f"no {column!r:.60}" if column is not None else "neither messages, prompt nor text"
        raise InputError(
            f"{path} has {what}, only {shown}; rename a column, or choose one that has text with "
            "--column"
        )
    used = {*PROMPTS, *JSON_COLUMNS, *MEDIA, ID, column}
    return [name for name in names if name in used]


def _parsed(name: str, value: Any, where: str) -> Any:
    """Return the value of a cell; conversations may be JSON in a string."""
    if name not in JSON_COLUMNS or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {name} is not valid JSON ({error}); correct the row") from error


def _csv_rows(file: IO[bytes], path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    before = csv.field_size_limit(MAX_LINE_BYTES)
    number = 0
    try:
        rows = (row for row in csv.reader(_decoded(file, path), strict=True) if row)  # not blank
        header = next(rows, [])
        used = set(_used(header, path, column))
        for number, cells in enumerate(rows, 1):
            where = f"{path} row {number}"
            if len(cells) != len(header):
                raise InputError(
                    f"{where} has {len(cells)} cells, and the header has {len(header)}; quote "
                    "cells with commas or line breaks"
                )
            row = {k: v for k, v in zip(header, cells, strict=True) if k in used and v}
            yield {name: _parsed(name, value, where) for name, value in row.items()}
    except csv.Error as error:
        raise InputError(
            f"{path} row {number + 1} is not valid CSV ({error}); quote cells with commas, quotes "
            "or line breaks"
        ) from error
    finally:
        csv.field_size_limit(before)


def _decoded(binary: IO[bytes], path: Path) -> Iterator[str]:
    """Yield the lines of a CSV file with their line breaks, which cells may contain."""
    offset = 0
    while line := binary.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes; split it")
        try:
            yield (line if offset else line.removeprefix(b"\xef\xbb\xbf")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8 text ({error.reason} at byte {offset + error.start}); "
                "convert the file"
            ) from error
        offset += len(line)


def _parquet_rows(file: IO[bytes], path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        used = _used(table.schema_arrow.names, path, column)
        for name in used:
            if name not in MEDIA:
                _check_type(table.schema_arrow.field(name).type, name, path)
        number = 0
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=used):
            for row in batch.to_pylist():
                number += 1
                yield {
                    name: bool(value)
                    if name in MEDIA
                    else _parsed(name, _without_nulls(value), f"{path} row {number}")
                    for name, value in row.items()
                }
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet: {str(error)[:200]}; write the file again"
        ) from error


def _check_type(kind: pyarrow.DataType, name: str, path: Path) -> None:
    """Check that JSON has all values of a column's type.

    Raises:
        InputError: it has not, such as those of a timestamp or a map.
    """
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    is_list = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(check(kind) for check in is_list):
        return _check_type(kind.value_type, name, path)
    if types.is_struct(kind):
        for field in kind:
            _check_type(field.type, f"{name}.{field.name}", path)
        return None
    plain = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    if not any(check(kind) for check in plain):
        raise InputError(
            f"{path} has a column {name} of type {kind}, which a conversation cannot have; store "
            "it as a string, a number, a list or a struct"
        )
    return None


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys of structs that are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def write_table(results: Path, target: Path, kind: FileFormat) -> None:
    """Write results as a table.

    Args:
        results: JSONL, one object per row, in order.
        target: the file to write.
        kind: ``csv`` or ``parquet``.

    Raises:
        OSError: the disk is full or not writable.
    """
    names: set[str] = set(ALWAYS)
    id_types: set[type] = set()
    for row in _results(results):
        names |= row.keys()
        if ID in row:
            id_types.add(_id_type(row[ID]))
    columns = [name for name in COLUMNS if name in names] + sorted(names - {*COLUMNS})
    if kind == "csv":
        _write_csv(results, target, columns)
    else:
        _write_parquet(results, target, columns, id_types)


def _results(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _id_type(value: object) -> type:
    """Return the type of an id as a column has it; dict means that it needs JSON."""
    if isinstance(value, int) and not isinstance(value, bool):
        return int if value in INT64 else dict
    return str if isinstance(value, str) and _is_unicode(value) else dict


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _write_csv(results: Path, target: Path, columns: list[str]) -> None:
    with target.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)  # RFC 4180: CRLF, quotes where needed
        writer.writerow(columns)
        for row in _results(results):
            cells = (row.get(name) for name in columns)
            writer.writerow([v if isinstance(v, str | None) else _json(v) for v in cells])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_parquet(results: Path, target: Path, columns: list[str], id_types: set[type]) -> None:
    import pyarrow
    from pyarrow import parquet

    text, number, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    token = [("token_id", number), ("token", text), ("logprob", real)]
    logprobs = pyarrow.struct([*token, ("top", pyarrow.list_(pyarrow.struct(token)))])
    calls = pyarrow.struct([("name", text), ("arguments", text)])
    is_plain_id = id_types in ({int}, {str})
    kinds = {
        "index": number,
        "is_complete": pyarrow.bool_(),
        ID: number if id_types == {int} else text,
        "prompt_tokens": number,
        "token_ids": pyarrow.list_(number),
        "seed": number,
        "logprobs": pyarrow.list_(logprobs),
        "function_calls": pyarrow.list_(calls),
    }
    schema = pyarrow.schema([(name, kinds.get(name, text)) for name in columns])

    def cells(row: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            key: value.encode("utf-8", "backslashreplace").decode()
            if isinstance(value, str) and key != ID
            else value
            for key, value in row.items()
        }
        for name in ("stop_reason", *(row.keys() - {*COLUMNS})):
            if row.get(name) is not None:
                found[name] = json.dumps(row[name])
        if ID in row and not is_plain_id:
            found[ID] = json.dumps(row[ID])
        if row.get("function_calls") is not None:
            found["function_calls"] = [
                call | {"arguments": json.dumps(call["arguments"])}
                for call in row["function_calls"]
            ]
        return found

    with parquet.ParquetWriter(target, schema) as writer:
        some: list[dict[str, Any]] = []
        for row in _results(results):
            some.append(cells(row))
            if len(some) == ROWS_AT_ONCE:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(some, schema))
                some = []
        if some:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(some, schema))
