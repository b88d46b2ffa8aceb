"""Read parsed JSON into dataclasses and check every value against its annotation."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["dataclass_from_json"]

Record = TypeVar("Record")

WORDS = {str: "a string", bool: "true or false", int: "a whole number", NoneType: "null"}


def dataclass_from_json(kind: type[Record], data: object) -> Record:
    """Return ``data``, as ``json.loads`` gave it, as the dataclass ``kind``.

    Fields may be dataclasses, lists, tuples, dictionaries, optional values, literals and plain
    types; ``Any`` accepts every value.

    Raises:
        ValueError: a value is missing, unknown or of another type; the message names its path.
    """
    found = _read(kind, data, "")
    assert isinstance(found, kind)
    return found


def _read(kind: Any, data: object, where: str) -> Any:
    """Return ``data`` as the annotation ``kind``; ``where`` names it in errors."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _record(kind, _object(data, where), where)
    if origin in (Union, UnionType):
        return None if data is None else _read(_not_none(parts), data, where)
    if origin is Literal:
        return _checked(data in parts, data, where, f"one of {', '.join(map(str, parts))}")
    if origin is dict:
        items = _object(data, where).items()
        return {key: _read(parts[1], value, _below(where, key)) for key, value in items}
    if origin in (list, tuple):
        _checked(isinstance(data, list), data, where, "a list")
        assert isinstance(data, list)
        return origin(_read(parts[0], value, f"{where}[{i}]") for i, value in enumerate(data))
    if kind is float:
        is_number = type(data) in (int, float) and math.isfinite(data)  # type: ignore[arg-type]
        return _checked(is_number, data, where, "a finite number")
    return _checked(type(data) is kind, data, where, WORDS[kind])


def _record(kind: Any, data: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    if unknown := data.keys() - known.keys():
        raise ValueError(f"{_below(where, min(unknown))} is unknown")
    for name, item in known.items():
        has_default = item.default is not MISSING or item.default_factory is not MISSING
        if name not in data and not has_default:
            raise ValueError(f"{_below(where, name)} is missing")
    return kind(
        **{name: _read(hints[name], value, _below(where, name)) for name, value in data.items()}
    )


def _not_none(parts: tuple[Any, ...]) -> Any:
    (kind,) = (part for part in parts if part is not NoneType)
    return kind


def _object(data: object, where: str) -> dict[str, Any]:
    _checked(isinstance(data, dict), data, where, "an object")
    assert isinstance(data, dict)
    return data


def _checked(is_right: bool, data: object, where: str, words: str) -> Any:
    if not is_right:
        raise ValueError(f"{where or 'it'} is {data!r:.60}; it must be {words}")
    return data


def _below(where: str, key: str) -> str:
    return f"{where}.{key:.60}" if where else f"{key:.60}"
