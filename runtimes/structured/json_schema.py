"""Check JSON schemas before text is generated for them: every keyword is enforced or rejected.

llguidance enforces most of JSON Schema 2020-12. It ignores keywords that it does not know, and some
limits hold for its text but not for the value that the text represents. Both are rejected here by
name, so that every finished text validates against its schema.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

import msgspec

from gemma3_export.errors import InputError
from gemma3_export.limits import MAX_COUNT, check_integer, check_number, shown

__all__ = ["ANNOTATIONS", "MAX_SCHEMA_BYTES", "check_json_schema"]

MAX_SCHEMA_BYTES = 2**20
MAX_DEPTH = 64  # objects and lists within each other
MAX_VALUES = 100_000  # a value that occurs in several places counts each time
MAX_EXACT = 2**53  # llguidance reads larger integers as rounded floats

SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties")
COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
VALUES = ("const", "enum")
OTHERS = ("type", "required", "pattern", "format", "$ref")
ANNOTATIONS = (
    *("$anchor", "$comment", "$id", "$schema", "default", "deprecated", "description"),
    *("discriminator", "example", "examples", "readOnly", "title", "writeOnly"),
)
KNOWN = {
    *SCHEMAS_BY_NAME,
    *LISTS_OF_SCHEMAS,
    *SCHEMAS,
    *COUNTS,
    *BOUNDS,
    *VALUES,
    *OTHERS,
    *ANNOTATIONS,
}
DRAFTS = ("2020-12", "2019-09", "draft-07", "draft-06")
REMEDIES = {
    "additionalItems": "write prefixItems for the first items and items for the rest",
    "nullable": 'write a list of types, such as "type": ["string", "null"]',
    "x-guidance": "leave it out",
}


def check_json_schema(schema: Any) -> str:
    """Return a JSON schema as JSON text.

    Args:
        schema: a mapping, or JSON text of an object.

    Raises:
        InputError: it is not JSON, is too large or too deep, or uses a keyword that cannot be
            enforced; the message names the keyword and its place.
    """
    if isinstance(schema, str):
        schema = _parse(schema)
    _check_values(schema)  # first: a message must not show a value without end
    if not isinstance(schema, Mapping):
        raise InputError(
            f"json_schema is {shown(schema)}; it must be a mapping, or JSON text of an object"
        )
    _check(schema, "$", is_root=True)
    _check_exclusive_bounds(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, default=dict)
        size = len(text.encode())
    except (TypeError, ValueError) as error:
        raise InputError(f"json_schema cannot be written as JSON: {error}") from error
    _check_size(size)
    return text


def _parse(text: str) -> Any:
    _check_size(len(text))  # at least as many bytes
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"json_schema is not valid JSON ({str(error)[:100]}): {shown(text)}"
        ) from error


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_SCHEMA_BYTES:
        raise InputError(
            f"json_schema has {size_bytes:,} bytes; the most is {MAX_SCHEMA_BYTES:,}; simplify it"
        )


def _check_values(schema: Any) -> None:
    """Check that every value within a schema is JSON, and that there are not too many.

    This takes no recursion, so that nothing deeper or larger is ever walked.
    """
    waiting: list[tuple[Any, int]] = [(schema, 0)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise InputError(
                f"json_schema has more than {MAX_DEPTH} levels or {MAX_VALUES:,} values; "
                "simplify it"
            )
        if isinstance(value, Mapping):
            if other := [key for key in value if not isinstance(key, str)]:
                raise InputError(f"json_schema has the key {shown(other[0])}; keys must be strings")
            waiting += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(child, depth + 1) for child in value]
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise InputError(f"json_schema contains {value}, which JSON does not have")
        elif not isinstance(value, str | int | None):
            raise InputError(
                f"json_schema contains a {type(value).__name__}, which JSON does not have"
            )


def _check(schema: Any, where: str, *, is_root: bool = False) -> None:
    """Check a schema and those within it."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _error(where, shown(schema), "is not a schema; write an object, true or false")
    for key in schema:
        if key not in KNOWN and (not key.startswith("x-") or key in REMEDIES):
            remedy = REMEDIES.get(key, "remove it, and check the result instead")
            raise _error(where, repr(key), f"cannot be enforced; {remedy}")
    _check_identity(schema, where, is_root=is_root)
    for key in COUNTS:
        if key in schema:
            check_integer(f"json_schema: {key} at {where}", schema[key], 0, MAX_COUNT)
    for key in BOUNDS:
        if key in schema:
            name = f"json_schema: {key} at {where}"
            _check_exact(schema[key], name)
            is_step = key == "multipleOf"
            check_number(name, schema[key], 0 if is_step else -math.inf, math.inf, is_open=is_step)
    for key in VALUES:
        if key in schema:
            _check_exact(schema[key], f"json_schema: {key} at {where}")
    _check_min_properties(schema, where)
    for child, place in _schemas_in(schema, where):
        _check(child, place)


def _check_identity(schema: Mapping[str, Any], where: str, *, is_root: bool) -> None:
    """Check the keywords that say what a schema is called, and which rules it follows."""
    draft = schema.get("$schema", DRAFTS[0])
    if not isinstance(draft, str) or not any(name in draft for name in DRAFTS):
        raise _error(
            where, f"$schema {shown(draft)}", f"is not supported; use one of {', '.join(DRAFTS)}"
        )
    if "$id" in schema and not is_root:
        raise _error(where, "'$id'", "cannot be enforced below the root; refer to #/$defs instead")
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise _error(
            where, f"$ref {shown(reference)}", "is outside the schema; copy its target to $defs"
        )
    if not _leads_to_a_schema(reference):
        raise _error(
            where,
            f"$ref {shown(reference)}",
            "leads to a place where no schema is expected; copy its target to $defs",
        )


def _leads_to_a_schema(reference: str) -> bool:
    """Return whether a JSON pointer passes schemas only; others than those are not checked."""
    steps = iter(unquote(reference).split("/")[1:])
    for key in steps:
        if key in SCHEMAS_BY_NAME or key in LISTS_OF_SCHEMAS:
            if next(steps, None) is None:
                return False
        elif key not in SCHEMAS:
            return False
    return True


def _check_exact(value: Any, name: str) -> None:
    """Check that the numbers within ``value`` survive a float."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, int) and abs(item) > MAX_EXACT:
            raise InputError(
                f"{name} is {shown(item)}; integers beyond 2**53 cannot be enforced exactly; use "
                "a smaller one, or a string with a pattern"
            )


def _check_min_properties(schema: Mapping[str, Any], where: str) -> None:
    """Check that a smallest number of properties does not have to count unnamed ones.

    An unnamed property may be written twice, which JSON allows and which counts once.
    """
    required = schema.get("required", ())
    named = len(set(required)) if _are_texts(required) else 0
    if schema.get("minProperties", 0) > max(1, named):
        raise _error(
            where,
            f"minProperties {schema['minProperties']}",
            "cannot be enforced; list as many names in required",
        )


def _check_exclusive_bounds(schema: Mapping[str, Any]) -> None:
    """Check that no whole number is excluded less than 1 from the opposite bound.

    llguidance 1.9 takes the 0 in exclusiveMinimum 0 with maximum 0.5. Where it merges schemas, the
    two bounds may come from different ones.
    """
    schemas = list(_all_schemas(schema))
    merging = {"anyOf", "oneOf", "$ref"}
    merges = any(
        "allOf" in one or (merging & one.keys() and set(BOUNDS) & one.keys()) for one in schemas
    )
    for group in [schemas] if merges else [[one] for one in schemas]:
        for excluded, opposites in (
            ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
            ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
        ):
            near = [one[key] for one in group for key in opposites if key in one]
            for one in group:
                bound = one.get(excluded, 0.5)
                if bound != int(bound) or one.get("type") == "integer":
                    continue
                if any(abs(other - bound) < 1 for other in near):
                    raise InputError(
                        f"json_schema: {excluded} {bound} cannot be enforced with the opposite "
                        "bound so close; use the type integer, or a bound that is included"
                    )


def _all_schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(schema, Mapping):
        yield schema
        for child, _ in _schemas_in(schema, ""):
            yield from _all_schemas(child)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _schemas_in(schema: Mapping[str, Any], where: str) -> Iterator[tuple[Any, str]]:
    """Yield the schemas within one, and their places."""
    for key in SCHEMAS_BY_NAME:
        children = schema.get(key, {})
        if not isinstance(children, Mapping):
            raise _error(where, f"{key} {shown(children)}", "is not an object of schemas")
        for name, child in children.items():
            yield child, f"{where}.{key}.{name:.40}"
    for key in LISTS_OF_SCHEMAS:
        children = schema.get(key, [])
        if not isinstance(children, list | tuple):
            raise _error(where, f"{key} {shown(children)}", "is not a list of schemas")
        for index, child in enumerate(children):
            yield child, f"{where}.{key}[{index}]"
    for key in SCHEMAS:
        if key not in schema:
            continue
        if key == "items" and isinstance(schema[key], list | tuple):
            raise _error(
                where, "a list of items", f"is not supported; {REMEDIES['additionalItems']}"
            )
        yield schema[key], f"{where}.{key}"


def _error(where: str, what: str, problem: str) -> InputError:
    return InputError(f"json_schema: {what} at {where} {problem}")
