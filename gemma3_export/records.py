"""Read the JSON files that this program wrote, and check every value against a dataclass.

Files are checked by msgspec. A record is rejected if a value is missing, unknown or of another
type; the message names the file, the key, the value and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar

import msgspec

from gemma3_export.errors import InputError
from gemma3_export.files import read_bytes

__all__ = ["MAX_JSON_BYTES", "Count", "is_deeper", "read_json", "read_record", "to_record"]

MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH = 64  # objects within objects; ours have about eight
Record = TypeVar("Record")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "array": "a list",
    "object": "an object",
}
JSON_TYPES: dict[type, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list: "array",
    dict: "object",
    NoneType: "null",
}
FAULT = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<place>.*)`)?", re.DOTALL)
STEP = re.compile(r"\.(?P<field>\w+)|\[(?P<index>\d+)\]|(?P<any>\[\.\.\.\])")


def read_json(path: Path, *, remedy: str) -> Any:
    """Parse a JSON file that this program wrote.

    Raises:
        InputError: it cannot be read, is too large or nested too deeply, or is not JSON.
    """
    data = read_bytes(path, limit_bytes=MAX_JSON_BYTES)
    try:
        found = msgspec.json.decode(data)
        is_too_deep = is_deeper(found, MAX_DEPTH)
    except RecursionError:
        is_too_deep = True
    except ValueError as error:  # msgspec's errors, and bytes that are not UTF-8
        what = re.sub(r" - at `\$.*`$", "", str(error))
        raise InputError(f"{path} is damaged: {what:.200}; {remedy}") from error
    if is_too_deep:
        raise InputError(
            f"{path} is damaged: it has more than {MAX_DEPTH} levels of nesting; {remedy}"
        )
    return found


def read_record(
    path: Path, kind: type[Record], *, remedy: str, format_versions: tuple[int, ...] = ()
) -> Record:
    """Read a JSON file as the dataclass ``kind``.

    Args:
        path: the file.
        kind: a dataclass; fields with defaults may be missing.
        remedy: what to do if the file is damaged, such as ``export the bundle again``.
        format_versions: the versions that this program reads, if the record has one.

    Raises:
        InputError: see :func:`read_json`; or a value is missing, unknown or of another type.
    """
    data = read_json(path, remedy=remedy)
    if format_versions and isinstance(data, dict):
        if "format_version" not in data:
            raise InputError(f"{path} is damaged: format_version is missing; {remedy}")
        if (found := data["format_version"]) not in format_versions:
            raise InputError(
                f"{path} has format version {found!r:.40} and this gemma3-export reads "
                f"{' and '.join(map(str, format_versions))}; upgrade gemma3-export or {remedy}"
            )
    return to_record(data, kind, where=str(path), remedy=remedy)


def to_record(
    data: object, kind: type[Record], *, where: str, remedy: str, is_part: bool = False
) -> Record:
    """Return parsed JSON as the dataclass ``kind``.

    Args:
        data: the parsed JSON.
        kind: a dataclass; fields with defaults may be missing.
        where: the file, for the message.
        remedy: what to do if it is damaged.
        is_part: ``kind`` has only some of the keys; others are ignored.

    Raises:
        InputError: a value is missing, unknown or of another type.
    """
    unknown = None
    try:
        found = msgspec.convert(data, kind, dec_hook=_make)
        if not is_part:
            unknown = next(_unknown(data, msgspec.to_builtins(found, enc_hook=str), ""), None)
    except msgspec.ValidationError as error:
        raise InputError(f"{where} is damaged: {_describe(error, data)}; {remedy}") from error
    except InputError as error:  # a dataclass rejects its values
        raise InputError(f"{where} is damaged: {error}; {remedy}") from error
    if unknown is not None:
        raise InputError(f"{where} is damaged: {unknown} is unknown; {remedy}")
    return found


def _make(kind: type, value: Any) -> Any:
    """Return a value of a type that JSON lacks, such as a path."""
    return kind(value)


def is_deeper(data: object, levels: int) -> bool:
    """Return whether parsed JSON has more than ``levels`` levels of nesting."""
    found = [data]
    for _ in range(levels + 1):
        found = [child for item in found for child in _children(item)]
        if not found:
            return False
    return True


def _children(item: object) -> Iterator[object]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list):
        yield from item


def _unknown(data: Any, known: Any, where: str) -> Iterator[str]:
    """Yield the keys of ``data`` that a record made from it, as JSON, lacks."""
    if isinstance(data, dict):
        for key, value in data.items():
            place = _below(where, key)
            if key in known:
                yield from _unknown(value, known[key], place)
            else:
                yield place
    elif isinstance(data, list):
        for index, (value, other) in enumerate(zip(data, known, strict=True)):
            yield from _unknown(value, other, f"{where}[{index}]")


def _describe(error: msgspec.ValidationError, data: object) -> str:
    """Return what is wrong, with the key and the value that msgspec's message leaves out."""
    match = FAULT.fullmatch(str(error))
    assert match is not None
    what, place = match["what"], match["place"] or ""
    found = [("", data)]
    for step in STEP.finditer(place):
        found = [below for key, value in found for below in _follow(step, key, value)]
    # A place within a dictionary does not say which entry it is in.
    key, value = next((item for item in found if _is_wrong(item[1], what)), ("", data))
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        return f"{_below(key, missing[1])} is missing"
    shown = f"{msgspec.json.encode(value).decode('utf-8', 'replace'):.60}"
    if what.startswith("Invalid enum value"):
        return f"{key} is {shown}, which is none of the known values"
    if expected := re.fullmatch(r"Expected `([\w |]+)`(?:, got `\w+`| ([<>]= \S+))", what):
        words = " or ".join(WORDS.get(name, name) for name in expected[1].split(" | "))
        bound = f" {expected[2]}" if expected[2] else ""
        return f"{key or 'it'} is {shown}; it must be {words}{bound}"
    return f"{key or 'it'} is {shown}: {what}"


def _follow(step: re.Match[str], key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if step["any"]:
        yield from ((_below(key, name), item) for name, item in value.items())
    elif step["index"]:
        yield f"{key}[{step['index']}]", value[int(step["index"])]
    elif step["field"] in value:
        yield _below(key, step["field"]), value[step["field"]]


def _is_wrong(value: Any, what: str) -> bool:
    if got := re.search(r"got `(\w+)`$", what):
        return JSON_TYPES[type(value)] == got[1]
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        return missing[1] not in value
    if invalid := re.fullmatch(r"Invalid enum value (.*)", what, re.DOTALL):
        return repr(value) == invalid[1]
    if bound := re.fullmatch(r"Expected `int` (>=|<=) (-?\d+)", what):
        limit = int(bound[2])
        return bool(value < limit if bound[1] == ">=" else value > limit)
    return True


def _below(where: str, key: str) -> str:
    return f"{where}.{key:.60}" if where else f"{key:.60}"
