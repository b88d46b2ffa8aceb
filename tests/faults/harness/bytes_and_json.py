"""Changes of bytes and of JSON that several formats share."""

from __future__ import annotations

import json
import random
from typing import Any

INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
)
RAW = "@raw:"  # a string that is written as it is, without quotes, where JSON has no value for it
VALUES: tuple[Any, ...] = (
    *INTEGERS,
    10**400,
    0.0,
    -0.0,
    0.5,
    1.0,
    1e-320,
    1e308,
    RAW + "NaN",
    RAW + "Infinity",
    RAW + "-Infinity",
    RAW + "1e999",
    RAW + "1E400",
    RAW + "01",
    RAW + "tru",
    RAW + "[" * 100_000,
    RAW + "[" * 5_000 + "]" * 5_000,
    RAW + '{"a":' * 3_000 + "1" + "}" * 3_000,
    RAW + '"\\ud800"',
    RAW + '"\\u0000"',
    RAW + "1" * 5_000,
    RAW + "1." + "1" * 50_000,
    None,
    True,
    False,
    "",
    " ",
    "0",
    "1",
    "nan",
    "../../etc/passwd",
    "/dev/zero",
    "a" * 300,
    "b" * 100_000,
    "\x1b[2Jred\r\n\x07",
    "\u202eabc",
    "é" * 20,
    [],
    {},
    [None],
    [[]],
    [0],
    ["a", 1, None],
    {"a": 1},
    list(range(100)),
)


def change_bytes(
    data: bytes, rng: random.Random, *, header: int | None = None
) -> tuple[str, bytes]:
    """Change ``data`` in one way; ``header`` bytes at its start are changed most often."""
    size = len(data)
    end = header if header and rng.random() < 0.8 else size
    at = rng.randrange(max(1, min(end, size)))
    length = min(rng.choice((1, 2, 4, 8, 16, 64, 1024)), size - at)
    raw = bytearray(data)
    kind = rng.choice(
        (
            "truncate",
            "flip",
            "flips",
            "zeros",
            "ones",
            "number",
            "cut",
            "repeat",
            "insert",
            "swap",
            "append",
        )
    )
    if kind == "truncate":
        return f"truncate at {at}", data[:at]
    if kind == "flip":
        raw[at] ^= 1 << rng.randrange(8)
        return f"flip a bit of byte {at}", bytes(raw)
    if kind == "flips":
        for _ in range(rng.randrange(2, 20)):
            raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
        return "flip many bits", bytes(raw)
    if kind in ("zeros", "ones"):
        raw[at : at + length] = bytes([255 * (kind == "ones")]) * length
        return f"{length} {kind} at {at}", bytes(raw)
    if kind == "number":
        width = rng.choice((4, 8))
        value = rng.choice(INTEGERS) % 2 ** (8 * width)
        raw[at : at + width] = value.to_bytes(width, "little")
        return f"{value} at {at}", bytes(raw)
    if kind == "cut":
        return f"cut {length} bytes at {at}", data[:at] + data[at + length :]
    if kind == "repeat":
        return f"repeat {length} bytes at {at}", data[: at + length] + data[at:]
    if kind == "insert":
        return f"insert {length} bytes at {at}", data[:at] + rng.randbytes(length) + data[at:]
    if kind == "swap":
        other = rng.randrange(max(1, min(end, size)))
        one, two = sorted((at, other))
        length = max(1, min(length, two - one, size - two))
        raw[one : one + length], raw[two : two + length] = (
            data[two : two + length],
            data[one : one + length],
        )
        return f"swap {length} bytes of {one} and {two}", bytes(raw)
    junk = rng.choice((b"\0", b"\n", b"junk", bytes(4096), data))
    return f"append {len(junk)} bytes", data + junk


def change_json(data: Any, rng: random.Random) -> tuple[str, str]:
    """Change one place of a JSON value; return the name of the change and the JSON text."""
    places = list(_places(data))
    path = rng.choice(places)
    kind = rng.choice(
        ("value", "value", "value", "number", "delete", "rename", "twice", "add", "swap")
    )
    if kind == "number" and isinstance(value := _at(data, path), int | float):
        kind, new = (
            "value",
            rng.choice((value + 1, -value, value * 2, float(value), value + 0.5, str(value))),
        )
    else:
        new = rng.choice(VALUES)
    where = "/".join(map(str, path))[:100]
    if not path:
        return f"the whole is {_short(new)}", to_text(new)
    changed = json.loads(json.dumps(data))
    parent, key = _at(changed, path[:-1]), path[-1]
    if kind == "delete":
        del parent[key]
        return f"delete {where}", to_text(changed)
    if kind == "rename" and isinstance(parent, dict):
        name = rng.choice(
            (key + "x", key.upper(), "", "\x1b[31m" + key, key + "\n", "é", "x" * 1000)
        )
        parent[name] = parent.pop(key)
        return f"rename {where} to {_short(name)}", to_text(changed)
    if kind == "twice" and isinstance(parent, dict):
        marker = "twice" * 4
        parent[marker] = new
        text = to_text(changed).replace(json.dumps(marker), json.dumps(key))
        return f"{where} also is {_short(new)}", text
    if kind == "add":
        if isinstance(parent, dict):
            parent[rng.choice(("new_key", "", "__class__", "_x"))] = new
        else:
            parent.insert(rng.randrange(len(parent) + 1), new)
        return f"add {_short(new)} beside {where}", to_text(changed)
    if kind == "swap":
        other = rng.choice([place for place in places if place])
        one, two = _at(changed, path), _at(data, other)
        parent[key] = json.loads(json.dumps(two))
        return f"{where} is what {'/'.join(map(str, other))[:60]} is, not {_short(one)}", to_text(
            changed
        )
    parent[key] = new
    return f"{where} is {_short(new)}", to_text(changed)


def to_text(data: Any, **options: Any) -> str:
    """Return ``data`` as JSON, with raw strings as they are."""
    text = json.dumps(data, **options)
    while (start := text.find('"' + RAW)) >= 0:
        end = start + 1
        while text[end] != '"' or text[end - 1] == "\\":
            end += 1
        raw = json.loads(text[start : end + 1])
        text = text[:start] + raw.removeprefix(RAW) + text[end + 1 :]
    return text


def _places(data: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _places(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _places(value, (*path, index))


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}... ({len(text)})"
