"""Grammars of function calls in FunctionGemma's format, whose arguments match their schemas.

A call is ``<start_function_call>call:NAME{KEY:VALUE,...}<end_function_call>``, and texts are
between two ``<escape>`` tokens, as :mod:`gemma3_export.tokenizer.function_calls` reads them.
Arguments come in the order in which FunctionGemma's template writes them: by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma3_export.errors import InputError
from gemma3_export.limits import shown
from gemma3_export.runtimes.structured.grammar import Grammar, check_source
from gemma3_export.runtimes.structured.json_schema import ANNOTATIONS, check_json_schema

__all__ = ["CHOICES", "CallTokens", "check_tool_choice", "function_call_grammar"]

CHOICES = ("auto", "required", "none")
OPTION = "tool_choice"
MAX_TOOLS = 128
TEXT = "/(?s:.*)/"
# Without bounds of a schema: what a double holds exactly, and the reader takes.
NUMBERS = {
    "integer": "/-?(0|[1-9][0-9]{0,14})/",
    "number": r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/",
}
WORDS = {"boolean": '("true" | "false")', "null": '"null"'}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
KEYWORDS = {  # by type; the others cannot be enforced in this format
    "string": ("minLength", "maxLength"),
    "integer": BOUNDS,
    "number": BOUNDS,
    "boolean": (),
    "null": (),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
_NAME = re.compile(r"[^\s{}\[\]:,<>]+")


@dataclass(frozen=True, slots=True)
class CallTokens:
    """The ids of the control tokens in a call."""

    start: int
    end: int
    escape: int


def check_tool_choice(tools: Sequence[Mapping[str, Any]] | None, choice: str) -> None:
    """Check that calls can be constrained to the schemas of ``tools``.

    Raises:
        InputError: there are no tools, none of them is the chosen one, or a schema cannot be
            enforced.
        UnavailableError: llguidance is not installed.
    """
    check_source(function_call_grammar(tools, choice, CallTokens(start=0, end=1, escape=2)))


def function_call_grammar(
    tools: Sequence[Mapping[str, Any]] | None, choice: str, tokens: CallTokens
) -> Grammar:
    """Return the grammar of an answer that may, must or must not call functions.

    Args:
        tools: JSON schemas of functions, as they go into the chat template.
        choice: ``auto``: text, calls, or text and then calls; ``required``: one call or more;
            ``none``: text; or the name of a function: one call of it.
        tokens: the control tokens.

    Raises:
        InputError: there are no tools, none of them is the chosen one, or a schema has a keyword
            that cannot be enforced; :func:`check_tool_choice` finds what llguidance rejects.
    """
    if not tools or len(tools) > MAX_TOOLS:
        raise InputError(f"{OPTION} needs 1 to {MAX_TOOLS} tools, and there are {len(tools or ())}")
    functions = dict(map(_function, tools))
    if len(functions) < len(tools):
        raise InputError(f"{OPTION}: two tools have the same name; rename one")
    starts = {"auto": "text call*", "required": "call+", "none": "text"}
    if choice not in starts:
        if choice not in functions:
            known = ", ".join((*CHOICES, *functions))
            raise InputError(f"{OPTION} is {shown(choice)}; it must be one of {known:.200}")
        functions = {choice: functions[choice]}
    writer = _Writer(tokens)
    calls = [writer.call(name, parameters) for name, parameters in functions.items()]
    rules = [f"start: {starts.get(choice, 'call')}", f"text: {TEXT}", f"call: {' | '.join(calls)}"]
    return Grammar(OPTION, "\n".join(["%llguidance {}", *rules, *writer.rules]))


def _function(tool: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the parameters of a tool."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{OPTION}: a tool has the name {shown(name)}; a name must be a word without brackets, "
            "colons and commas"
        )
    parameters = function.get("parameters") or {"type": "object"}
    try:
        check_json_schema(parameters)
    except InputError as error:
        raise InputError(f"{OPTION}: the parameters of {name:.40}: {error}") from error
    if parameters.get("type", "object") != "object":
        raise InputError(f"{OPTION}: the parameters of {name:.40} must have the type object")
    return name, {"type": "object", **parameters}


@dataclass(slots=True)
class _Writer:
    """Writes the rules of calls, in llguidance's variant of Lark."""

    tokens: CallTokens
    rules: list[str] = field(default_factory=list)

    def call(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Return the name of a rule for calls of one function."""
        start, end = f"<[{self.tokens.start}]>", f"<[{self.tokens.end}]>"
        arguments = self._value(parameters, name)
        return self._rule(f"{start} {_literal(f'call:{name}')} {arguments} {end}")

    def _rule(self, body: str) -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _value(self, schema: Any, where: str) -> str:
        """Return an expression for the values of a schema."""
        if not isinstance(schema, Mapping):
            raise _error(where, f"the schema {shown(schema)}")
        used = {key for key in schema if key not in ANNOTATIONS and not key.startswith("x-")}
        if used & {"enum", "const"}:
            if extra := sorted(used - {"enum", "const", "type"}):
                raise _error(where, f"{extra[0]!r} beside enum or const")
            return self._one_of(schema, where)
        if "anyOf" in used:
            if extra := sorted(used - {"anyOf"}):
                raise _error(where, f"{extra[0]!r} beside anyOf")
            options = [self._value(option, f"{where}.anyOf") for option in schema["anyOf"]]
            return f"({' | '.join(options)})"
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not kinds or not set(kinds) <= KEYWORDS.keys():
            raise _error(where, f"the type {shown(schema.get('type'))}")
        legal = {"type", *(key for kind in kinds for key in KEYWORDS[kind])}
        if extra := sorted(used - legal):
            raise _error(where, repr(extra[0]))
        return f"({' | '.join(self._of_type(kind, schema, where) for kind in kinds)})"

    def _of_type(self, kind: str, schema: Mapping[str, Any], where: str) -> str:
        if kind in WORDS:
            return WORDS[kind]
        if kind == "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            bounded = TEXT if not least and most == "" else f"/(?s:.{{{least},{most}}})/"
            return self._escaped(bounded)
        if kind == "array":
            return self._array(schema, where)
        if kind == "object":
            return self._object(schema, where)
        bounds = {key: schema[key] for key in BOUNDS if key in schema}
        return f"%json {json.dumps({'type': kind, **bounds})}" if bounds else NUMBERS[kind]

    def _escaped(self, text: str) -> str:
        return f"<[{self.tokens.escape}]> {text} <[{self.tokens.escape}]>"

    def _one_of(self, schema: Mapping[str, Any], where: str) -> str:
        """Return an expression for the values of ``enum`` or ``const``."""
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        found = []
        for value in values:
            if isinstance(value, str):
                found.append(self._escaped(_literal(value) if value else ""))
            elif value is None or isinstance(value, bool | int | float):
                found.append(_literal(json.dumps(value)))
            else:
                raise _error(where, f"the value {shown(value)}")
        return f"({' | '.join(found)})"

    def _array(self, schema: Mapping[str, Any], where: str) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most is not None and most < max(least, 1):
            raise _error(where, f"maxItems {most}")
        item = self._rule(self._value(schema.get("items"), f"{where}.items"))
        more = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        items = f'{item} ("," {item}){more}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _object(self, schema: Mapping[str, Any], where: str) -> str:
        """Return an expression for ``{key:value,...}`` with the keys in order.

        Each key has two rules, without and with an argument before it, which differ in the comma.
        """
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if unknown := [name for name in required if name not in properties]:
            raise _error(where, f"the required name {shown(unknown[0])}, which has no schema,")
        first = other = '""'
        for name in sorted(properties, key=str.lower, reverse=True):
            if not _NAME.fullmatch(name):
                raise _error(where, f"the name {shown(name)}")
            place = f"{where}.{name:.40}"
            entry = self._rule(f"{_literal(f'{name}:')} {self._value(properties[name], place)}")
            skipped = (None, None) if name in required else (first, other)
            first, other = (
                self._rule(" | ".join(_options(f"{entry} {other}", skipped[0]))),
                self._rule(" | ".join(_options(f'"," {entry} {other}', skipped[1]))),
            )
        return f'"{{" {first} "}}"'


def _options(*bodies: str | None) -> Iterator[str]:
    return (body for body in bodies if body is not None)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _error(where: str, what: str) -> InputError:
    return InputError(
        f"{OPTION}: {what} at {where} cannot be enforced in a function call; remove it, or leave "
        f"{OPTION} out"
    )
