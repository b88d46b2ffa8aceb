"""The reader of our own JSON files: every damage is one line with file, key, value and remedy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from gemma3_export.errors import InputError
from gemma3_export.records import MAX_JSON_BYTES, Count, read_record

REMEDY = "bake it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    name: str
    grams: Count
    kind: Literal["sponge", "cream"] = "sponge"
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.grams == 13:
            raise InputError("13 grams are not sold")


@dataclass(kw_only=True)
class Cake:
    layers: dict[str, Layer]
    steps: tuple[str, ...] = ()
    hours: float = 1.5
    notes: dict[str, Any] = field(default_factory=dict)
    format_version: int = 4


def layer(**changes: object) -> dict[str, object]:
    return {"name": "n", "grams": 5} | changes


def written(path: Path, data: object) -> Path:
    text = data if isinstance(data, str) else json.dumps(data)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_record_is_read_with_its_types(tmp_path: Path) -> None:
    data = {
        "format_version": 4,
        "layers": {"a": layer(folder="/x", kind="cream")},
        "steps": ["mix"],
        "hours": 2,
        "notes": {"anything": [None, {"at": 1}]},
    }
    found = read_record(written(tmp_path / "f", data), Cake, remedy=REMEDY, format_versions=(4,))
    assert found == Cake(
        layers={"a": Layer(name="n", grams=5, kind="cream", folder=Path("/x"))},
        steps=("mix",),
        hours=2.0,
        notes={"anything": [None, {"at": 1}]},
    )


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("", "damaged: Input data was truncated"),
        ('{"layers": {}', "damaged: Input data was truncated"),
        ('{"layers": {}} x', "damaged: JSON is malformed"),
        ('{"layers": {}, "hours": NaN}', "damaged: JSON is malformed"),
        ('{"layers": {}, "hours": 1e999}', "out of range"),
        ([], r"it is \[\]; it must be an object"),
        (7, "it is 7; it must be an object"),
        ({}, "format_version is missing"),
        ({"format_version": 4}, "layers is missing"),
        ({"format_version": 5, "layers": {}}, "has format version 5 and .* reads 4; upgrade"),
        ({"format_version": "4", "layers": {}}, "has format version '4'"),
        ({"layers": []}, r"layers is \[\]; it must be an object"),
        ({"layers": {}, "lyers": 1}, "lyers is unknown"),
        ({"layers": {"a": layer(), "b": layer(x=1)}}, r"layers\.b\.x is unknown"),
        ({"layers": {"a": layer(), "b": {"name": "n"}}}, r"layers\.b\.grams is missing"),
        (
            {"layers": {"a": layer(), "b": layer(grams="5")}},
            r'layers\.b\.grams is "5"; it must be a whole number',
        ),
        ({"layers": {"a": layer(), "b": layer(grams=True)}}, r"layers\.b\.grams is true"),
        ({"layers": {"a": layer(), "b": layer(grams=5.5)}}, r"layers\.b\.grams is 5\.5"),
        ({"layers": {"a": layer(), "b": layer(grams=-1)}}, r"layers\.b\.grams is -1; .* >= 0"),
        ({"layers": {"a": layer(), "b": layer(grams=2**70)}}, rf"layers\.b\.grams is {2**70}"),
        ({"layers": {"b": layer(name=None)}}, r"layers\.b\.name is null; it must be a string"),
        ({"layers": {"a": layer(), "b": layer(kind="jam")}}, r'layers\.b\.kind is "jam", which'),
        ({"layers": {"b": layer(folder=5)}}, r"layers\.b\.folder is 5"),
        ({"layers": {"b": layer(grams=13)}}, "damaged: 13 grams are not sold"),
        ({"layers": {}, "steps": ["mix", 5]}, r"steps\[1\] is 5; it must be a string"),
        ({"layers": {}, "hours": "2"}, r'hours is "2"; it must be a number'),
        ({"layers": {}, "notes": None}, "notes is null; it must be an object"),
        ({"layers": {"n" * 300: layer(grams=[])}}, rf"layers\.{'n' * 60}\.grams is \[\]"),
        ('{"layers": {}, "notes": {"a": ' + '{"a": ' * 70 + "1" + "}" * 72, "64 levels of nesting"),
        ("[" * 200_000 + "]" * 200_000, "64 levels of nesting"),
        ('{"layers": {"b": {"name": "n", "grams": ' + "1" * 5000 + "}}}", "out of range"),
    ],
)
def test_a_damaged_record_is_one_line_that_names_the_place(
    tmp_path: Path, data: object, complaint: str
) -> None:
    if isinstance(data, dict) and data and "layers" in data:
        data = {"format_version": 4} | data
    path = written(tmp_path / "cake.json", data)
    versions = () if isinstance(data, str) else (4,)
    with pytest.raises(InputError, match=complaint) as caught:
        read_record(path, Cake, remedy=REMEDY, format_versions=versions)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(REMEDY)
    assert "\n" not in message
    assert len(message) < 500


def test_a_record_that_is_not_utf8_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'{"layers": {}, "notes": {"a": "\xff"}}')
    with pytest.raises(InputError, match=f"f is damaged: .*; {REMEDY}"):
        read_record(tmp_path / "f", Cake, remedy=REMEDY)


def test_a_huge_record_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(43 * 10**6)
    assert MAX_JSON_BYTES < 43 * 10**6
    with pytest.raises(InputError, match="is larger than 16 MiB"):
        read_record(tmp_path / "f", Cake, remedy=REMEDY)


def test_infinity_has_no_json(tmp_path: Path) -> None:
    text = json.dumps({"layers": {}, "hours": -math.inf})
    with pytest.raises(InputError, match="is damaged"):
        read_record(written(tmp_path / "f", text), Cake, remedy=REMEDY)
