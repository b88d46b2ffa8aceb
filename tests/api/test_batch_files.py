"""``batch`` with CSV and Parquet files, read and written by libraries that are not ours."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gemma3_export.api import batch as batch_module
from gemma3_export.api.batch_files import check_packages, open_rows, write_table
from gemma3_export.errors import InputError, UnavailableError
from tests.support.command_line import error_line, run, run_ok

pyarrow = pytest.importorskip("pyarrow", reason="the extra `batch` is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

PROMPTS = ["the sea", 'a, "quoted"\r\nline', "x", "Grüße 🌊"]
ROWS = [{"id": f"n{i}", "prompt": text} for i, text in enumerate(PROMPTS)]
CHAT = [{"role": "user", "content": "the sea"}]


def batch(bundle: Path, source: Path, target: Path, *more: object) -> tuple[object, ...]:
    return ("batch", bundle, source, target, "--max-new-tokens", 4, *more)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return results as JSON data, whatever the format is."""
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
        for row in rows:
            if row["stop_reason"] is not None:
                row["stop_reason"] = json.loads(row["stop_reason"])
        return rows
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for name in ("index", "prompt_tokens", "token_ids", "seed", "stop_reason"):
                row[name] = json.loads(row[name]) if row[name] else None
        return rows
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(path: Path, tmp_path: Path, column: str | None = None) -> list[dict[str, Any]]:
    with path.open("rb") as file, open_rows(file, path, tmp_path, column) as rows:
        return [json.loads(line) for line in rows]


@pytest.fixture(scope="module")
def expected(ort_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("jsonl")
    source = write_rows(folder / "in.jsonl", ROWS)
    run_ok(*batch(ort_bundle, source, folder / "out.jsonl"))
    return read_results(folder / "out.jsonl")


@pytest.mark.parametrize(
    ("source_name", "target_name"), [("in.csv", "out.parquet"), ("in.parquet", "out.CSV")]
)
def test_results_are_those_of_jsonl(
    ort_bundle: Path, tmp_path: Path, expected: Any, source_name: str, target_name: str
) -> None:
    source = write_rows(tmp_path / source_name, ROWS)
    target = tmp_path / target_name
    run_ok(*batch(ort_bundle, source, target))
    found = read_results(target.rename(target.with_suffix(target.suffix.lower())))
    assert [row["id"] for row in found] == ["n0", "n1", "n2", "n3"]
    assert found == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [source_name, target_name.lower()]
    )


def test_conversations_are_nested_in_parquet_and_json_in_csv(
    ort_bundle: Path, tmp_path: Path
) -> None:
    rows = [{"messages": CHAT, "id": 3}, {"messages": [*CHAT, *CHAT[:0]], "id": 4}]
    run_ok(*batch(ort_bundle, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "a.jsonl"))
    run_ok(*batch(ort_bundle, write_rows(tmp_path / "in.parquet", rows), tmp_path / "b.jsonl"))
    cells = [{"messages": json.dumps(row["messages"]), "id": row["id"]} for row in rows]
    run_ok(*batch(ort_bundle, write_rows(tmp_path / "in.csv", cells), tmp_path / "c.parquet"))
    first = read_results(tmp_path / "a.jsonl")
    assert read_results(tmp_path / "b.jsonl") == first
    texts = [row["text"] for row in first]
    assert [row["text"] for row in read_results(tmp_path / "c.parquet")] == texts


def test_an_interrupted_run_continues_and_writes_the_table_once(
    ort_bundle: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_rows(tmp_path / "in.parquet", ROWS), tmp_path / "out.parquet"
    real = batch_module.UnfinishedResults.add
    added = []

    def add(self: Any, index: int, result: Any) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(index)
        real(self, index, result)

    monkeypatch.setattr(batch_module.UnfinishedResults, "add", add)
    assert run(*batch(ort_bundle, source, target, "--batch-size", 1)).exit_code == 130
    assert not target.exists()
    names = sorted(path.name for path in (tmp_path / ".out.parquet.partial").iterdir())
    assert names == ["results.jsonl"]
    monkeypatch.setattr(batch_module.UnfinishedResults, "add", real)
    result = run_ok(*batch(ort_bundle, source, target))
    assert "2 from an earlier run" in result.stderr
    assert read_results(target) == expected


def test_broken_rows_are_recorded_with_their_numbers(ort_bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('id,prompt\r\n1,"the\r\nsea"\r\n2,\r\n3,x\r\n', newline="")
    assert "in.csv row 2 has neither messages, prompt nor text" in error_line(
        *batch(ort_bundle, source, tmp_path / "out.csv")
    )
    run_ok(*batch(ort_bundle, source, tmp_path / "out.csv", "--on-error", "record"))
    found = read_results(tmp_path / "out.csv")
    assert [bool(row["error"]) for row in found] == [False, True, False]
    assert found[1]["id"] == "2"
    assert "row 2" in found[1]["error"]


CSV_FAULTS = {
    "id,prompt\n1,a,b\n": "in.csv row 1 has 3 cells, and the header has 2",
    'id,prompt\n1,"a\n': "in.csv row 1 is not valid CSV",
    'id,prompt\n1,"a"b\n': "in.csv row 1 is not valid CSV",
    "prompt,prompt\na,b\n": "two columns 'prompt'",
    "question,answer\na,b\n": r"neither messages, prompt nor text, only answer, question.*--column",
    "": "no columns",
    "messages\n[1\n": "in.csv row 1: messages is not valid JSON",
    b"prompt\n\xff\n": r"not UTF-8 text \(.* at byte 7\)",
    "images,prompt\na.png,x\n": "in.csv row 1 has images",
}


@pytest.mark.parametrize("text", CSV_FAULTS)
def test_a_csv_file_that_is_not_one_is_rejected(
    ort_bundle: Path, tmp_path: Path, text: str | bytes
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = error_line(*batch(ort_bundle, source, target))
    assert re.search(CSV_FAULTS[text], line), line
    assert not target.exists()


def test_cells_are_texts_and_keep_every_character(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(
        '\ufeffid,prompt,rest\r\n007," a\r\nb\u2028c\td ",1\r\n\r\n,NULL,\r\n'.encode()
    )
    assert rows_of(source, tmp_path) == [
        {"id": "007", "prompt": " a\r\nb\u2028c\td "},
        {"prompt": "NULL"},
    ]
    assert rows_of(source, tmp_path, "rest")[0]["rest"] == "1"


def test_parquet_values_keep_their_types_and_nulls_of_structs_are_missing_keys(
    tmp_path: Path,
) -> None:
    rows = [
        {"id": 2**60, "prompt": [{"role": "user", "content": "a", "name": None}], "other": b"x"},
        {"id": None, "prompt": [{"role": "user", "content": "b", "name": "me"}], "other": b"y"},
    ]
    assert rows_of(write_rows(tmp_path / "in.parquet", rows), tmp_path) == [
        {"id": 2**60, "prompt": [{"role": "user", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "b", "name": "me"}]},
    ]
    many = [{"text": f"{number}"} for number in range(700)]
    assert rows_of(write_rows(tmp_path / "many.parquet", many), tmp_path) == many


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([b"a"]), "a column prompt of type binary"),
        (pyarrow.array([[1]], pyarrow.list_(pyarrow.timestamp("s"))), "prompt of type timestamp"),
        (pyarrow.array([[("a", "b")]], pyarrow.map_("string", "string")), "prompt of type map"),
        (pyarrow.array([float("nan")]), "row 1 cannot be read: Out of range float"),
    ],
)
def test_values_that_json_lacks_are_rejected(tmp_path: Path, column: Any, message: str) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"prompt": column}), path)
    with pytest.raises(InputError, match=re.escape(message)):
        rows_of(path, tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 200])
def test_a_damaged_parquet_file_is_rejected(ort_bundle: Path, tmp_path: Path, cut: int) -> None:
    source = write_rows(tmp_path / "in.parquet", ROWS)
    source.write_bytes(source.read_bytes()[:cut])
    line = error_line(*batch(ort_bundle, source, tmp_path / "out.csv"))
    assert "in.parquet cannot be read as Parquet" in line


RESULT = {
    "index": 0,
    "prompt_tokens": 2,
    "text": "a",
    "token_ids": [5, 6],
    "finish_reason": "stop",
    "stop_reason": "END",
    "seed": None,
}
FAILED = {"index": 1, "error": "too long"}
CALLS = {
    "logprobs": [{"token_id": 5, "token": "a", "logprob": -0.5, "top": []}],
    "function_calls": [{"name": "f", "arguments": {"x": [1, {}]}}],
}


def table_of(rows: list[dict[str, Any]], target: Path) -> Path:
    results = target.with_suffix(".jsonl")
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(results, target, "csv" if target.suffix == ".csv" else "parquet")
    return target


@pytest.mark.parametrize(
    ("ids", "kind", "stored"),
    [
        ([7, 8], "int64", [7, 8]),
        (["7", "b"], "string", ["7", "b"]),
        (["7", 7], "string", ['"7"', "7"]),
        ([2**70, 1], "string", [str(2**70), "1"]),
        ([{"a": 1}, True], "string", ['{"a": 1}', "true"]),
        (["\ud800", "b"], "string", ['"\\ud800"', '"b"']),
    ],
)
def test_ids_of_one_type_keep_it_and_others_are_json(
    tmp_path: Path, ids: list[Any], kind: str, stored: list[Any]
) -> None:
    rows = [RESULT | {"id": ids[0]}, FAILED | {"id": ids[1]}]
    table = parquet.read_table(table_of(rows, tmp_path / "out.parquet"))
    assert str(table.schema.field("id").type) == kind
    assert table["id"].to_pylist() == stored


def test_columns_do_not_depend_on_the_first_row(tmp_path: Path) -> None:
    rows = [FAILED | {"index": 0}, RESULT | CALLS | {"index": 1}, RESULT | {"stop_reason": 106}]
    found = parquet.read_table(table_of(rows, tmp_path / "out.parquet")).to_pylist()
    assert [row["error"] for row in found] == ["too long", None, None]
    assert [row["stop_reason"] for row in found] == [None, '"END"', "106"]
    assert found[0]["token_ids"] is None
    assert found[1]["logprobs"] == CALLS["logprobs"]
    assert found[1]["function_calls"] == [{"name": "f", "arguments": '{"x": [1, {}]}'}]
    text = table_of(rows, tmp_path / "out.csv").read_bytes().decode()
    header, first, second, third = text.split("\r\n")[:4]
    assert header.split(",")[:3] == ["index", "text", "finish_reason"]
    assert first == "0,,,,,,,,,too long"
    assert second.startswith('1,a,stop,END,2,"[5, 6]",,"[{""token_id"": 5,')
    assert third.startswith("0,a,stop,106,2,")


def test_results_of_later_versions_have_a_place(tmp_path: Path) -> None:
    row = RESULT | {"is_complete": True, "zeal": {"a": [1]}}
    (found,) = parquet.read_table(table_of([row], tmp_path / "out.parquet")).to_pylist()
    assert found["is_complete"] is True
    assert found["zeal"] == '{"a": [1]}'
    header, line, _ = table_of([row], tmp_path / "out.csv").read_text().split("\n")
    assert header.endswith(",seed,zeal")
    assert line.endswith(',"{""a"": [1]}"')
    assert ",true,2," in line


def test_parquet_without_pyarrow_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_packages(tmp_path / "in.jsonl", tmp_path / "out.csv")
    message = r'out.parquet needs pyarrow; run: pip install "gemma3-export\[batch\]"'
    with pytest.raises(UnavailableError, match=message):
        check_packages(tmp_path / "in.jsonl", tmp_path / "out.parquet")
