"""JSON schemas to generate text for: random ones, and ones as people write them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = ("a", "b", "key", "été", 'quo"te', "x y", "▁", "new\nline", "😀")
TEXTS = ("", "a", "yes", "é▁ü", 'a "b" \\', "line\nbreak", "😀", " ", "<eos>", "</s>")
PATTERNS = ("^a+$", "b", "^[A-Z]{2}[0-9]{1,3}$", "^(x|yz)*$", "^.{2,4}$", "é|[^a-z]", r"^\d\s\w$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname")
numbers = st.one_of(
    st.integers(-1000, 1000),
    st.floats(-50, 50, allow_nan=False).map(lambda value: round(value, 3)),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(TEXTS))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def _options(draw: st.DrawFn, required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Return a schema with some of the optional keywords, in any order."""
    schema = {key: draw(strategy) for key, strategy in required.items()}
    for key in draw(st.permutations(sorted(optional))):
        if draw(st.booleans()):
            schema[key] = draw(optional[key])
    return schema


@st.composite
def _object(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    properties = draw(st.dictionaries(st.sampled_from(NAMES), inner, max_size=3))
    if properties or draw(st.booleans()):
        schema["properties"] = properties
    if properties and draw(st.booleans()):
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    schema["additionalProperties"] = draw(st.one_of(st.just(False), st.just(False), inner))
    if draw(st.integers(0, 4)) == 0:
        schema["patternProperties"] = {draw(st.sampled_from(PATTERNS)): draw(inner)}
    schema["maxProperties"] = 3
    if properties and set(schema.get("required", ())) != set(properties):
        del schema["maxProperties"]  # llguidance cannot count optional ones
    if draw(st.integers(0, 3)) == 0:
        schema["minProperties"] = draw(st.integers(0, 3))
    return schema


def _within(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        _options(
            {"type": st.just("array"), "maxItems": st.integers(0, 3)},
            items=inner,
            prefixItems=st.lists(inner, max_size=2),
            minItems=st.integers(0, 3),
        ),
        _object(inner),
        _object(inner),
        st.fixed_dictionaries({"anyOf": some}),
        st.fixed_dictionaries({"oneOf": some}),
        st.fixed_dictionaries({"allOf": some}),
        st.builds(lambda first, second: {**first, "anyOf": [second, first]}, inner, inner),
        st.just({"$ref": "#/$defs/shared"}),
    )


_leaves = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["null", "boolean"]}]),
    _options(
        {"type": st.sampled_from(["integer", "number", ["integer", "null"]])},
        minimum=numbers,
        maximum=numbers,
        exclusiveMinimum=numbers,
        exclusiveMaximum=numbers,
        multipleOf=st.sampled_from([1, 2, 3, 7, 0.5, 0.1, 10]),
    ),
    _options(
        {"type": st.just("string"), "maxLength": st.integers(0, 6)},
        minLength=st.integers(0, 4),
        pattern=st.sampled_from(PATTERNS),
    ),
    st.fixed_dictionaries({"type": st.just("string"), "format": st.sampled_from(FORMATS)}),
    st.fixed_dictionaries({"enum": st.lists(values, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"const": values}),
)
_schemas = st.recursive(_leaves, _within, max_leaves=6)
random_schemas = st.builds(
    lambda schema, shared: {**schema, "$defs": {"shared": shared}}, _schemas, _leaves
)

PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12, "description": "in full"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"anyOf": [{"type": "string", "format": "email"}, {"type": "null"}]},
        "roles": {
            "type": "array",
            "items": {"enum": ["admin", "user", "guest"]},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "roles"],
    "additionalProperties": False,
}
REAL_LIFE: dict[str, Any] = {
    "person": PERSON,
    "order": {  # as pydantic writes nested models and discriminated unions
        "$defs": {
            "Item": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "quantity": {"type": "integer", "exclusiveMinimum": 0, "maximum": 99},
                    "price": {"type": "number", "minimum": 0.01, "maximum": 999.99},
                },
                "required": ["sku", "quantity", "price"],
                "additionalProperties": False,
            },
            "Card": {
                "type": "object",
                "properties": {"kind": {"const": "card"}, "last4": {"pattern": "^[0-9]{4}$"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
            "Cash": {
                "type": "object",
                "properties": {"kind": {"const": "cash"}, "change": {"type": "boolean"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
        },
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "maxItems": 2},
            "payment": {
                "discriminator": {"propertyName": "kind"},
                "oneOf": [{"$ref": "#/$defs/Card"}, {"$ref": "#/$defs/Cash"}],
            },
        },
        "required": ["items", "payment"],
        "additionalProperties": False,
    },
    "tree": {
        "type": "object",
        "properties": {
            "value": {"type": "integer", "multipleOf": 5, "minimum": -20, "maximum": 20},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    },
    "unicode": {
        "type": "object",
        "properties": {
            "größe": {"enum": ["klein", "groß", "▁", "日本語", 'mit "Zitat"\n']},
            "emoji": {"type": "string", "pattern": "^[😀-😎é]{1,3}$"},
        },
        "required": ["größe", "emoji"],
        "additionalProperties": False,
    },
    "map": {
        "type": "object",
        "properties": {"id": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["id"],
        "additionalProperties": {"type": "string", "maxLength": 3},
        "maxProperties": 3,
    },
    "matrix": {
        "type": "array",
        "prefixItems": [{"enum": ["v1", "v2"]}, {"type": "string", "format": "date"}],
        "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "minItems": 3,
        "maxItems": 4,
    },
    "scalar": {"type": ["number", "null"], "minimum": -1.5, "maximum": 1.5},
}
