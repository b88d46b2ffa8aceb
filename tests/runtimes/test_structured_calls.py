"""Function calls constrained to schemas: all are read back, and their arguments validate."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gemma3_export.errors import InputError
from gemma3_export.runtimes.structured.constraint import ConstraintFactory
from gemma3_export.runtimes.structured.function_calls import (
    CallTokens,
    check_tool_choice,
    function_call_grammar,
)
from gemma3_export.tokenizer import FunctionCall, Tokenizer, load_tokenizer
from tests.support.chat_templates import WEATHER, write_tokenizer

pytest.importorskip("llguidance", reason="run `make setup`")
jsonschema = pytest.importorskip("jsonschema", reason="run `make setup`")

BOOK = {
    "type": "function",
    "function": {
        "name": "book.table-2",
        "parameters": {
            "type": "object",
            "properties": {
                "Zeit": {"type": "string", "minLength": 1, "maxLength": 4},
                "guests": {"type": "integer", "minimum": 1, "maximum": 12},
                "table": {"anyOf": [{"enum": ["in", "out", ""]}, {"type": "null"}]},
                "tip": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
                "extras": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                "contact": {
                    "type": "object",
                    "properties": {"mail": {"type": "string"}, "age": {"type": "integer"}},
                    "required": ["age"],
                    "additionalProperties": False,
                },
            },
            "required": ["guests", "Zeit"],
        },
    },
}
NOW = {"name": "now", "description": "has no parameters"}
TOOLS = [WEATHER, BOOK, NOW]
SCHEMAS = {
    "get_weather": WEATHER["function"]["parameters"],
    "book.table-2": BOOK["function"]["parameters"],
    "now": {"type": "object", "maxProperties": 0},
}


class Writer:
    """Writes random answers, and rather ends values than not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stops = tokenizer.chat.end_token_ids
        self.tokens = CallTokens(*tokenizer.chat.call_token_ids())
        self.factory = ConstraintFactory(tokenizer, tokenizer.vocab_size + 3)
        tokens = self.tokens
        self.ends = {tokens.start, tokens.escape, tokens.end, tokenizer.token_id("}")}

    def write(self, tools: Any, choice: str, seed: int, most: int = 300) -> list[int] | None:
        """Return a complete answer's tokens, None if it became too long."""
        random = np.random.default_rng(seed)
        grammar = function_call_grammar(tools, choice, self.tokens)
        constraint = self.factory.new(grammar, self.stops)
        written: list[int] = []
        while len(written) < most and not constraint.has_ended:
            allowed = np.flatnonzero(constraint.allowed()).tolist()
            ends = [token_id for token_id in allowed if token_id in self.ends]
            stops = [token_id for token_id in allowed if token_id in self.stops]
            preferred = stops if stops and random.random() < 0.2 else ends
            some = preferred if preferred and random.random() < 0.5 else allowed
            token_id = int(random.choice(some))
            constraint.accept(token_id)
            written.append(token_id)
            if token_id in self.stops:
                break
        return written if constraint.is_complete else None

    def read(self, written: list[int]) -> tuple[str, list[FunctionCall]]:
        return self.tokenizer.chat.read_answer(written)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = write_tokenizer(tmp_path_factory.mktemp("calls"), "functiongemma")
    return Writer(load_tokenizer(folder))


@pytest.mark.parametrize("choice", ["auto", "required", "none", "now", "book.table-2"])
def test_calls_are_read_back_and_their_arguments_validate(writer: Writer, choice: str) -> None:
    names: set[str] = set()
    texts: list[str] = []
    for seed in range(25):
        written = writer.write(TOOLS, choice, seed)
        if written is None:
            continue
        text, calls = writer.read(written)
        texts.append(text)
        names |= {call.name for call in calls}
        for call in calls:
            jsonschema.Draft202012Validator(SCHEMAS[call.name]).validate(call.arguments)
        if choice == "required":
            assert calls
            assert text == ""
        elif choice == "none":
            assert not calls
        elif choice in SCHEMAS:
            assert [call.name for call in calls] == [choice]
    if choice in ("auto", "required"):
        assert names == set(SCHEMAS)
    if choice in ("auto", "none"):
        assert any(texts)


leaves = st.one_of(
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    st.builds(
        lambda kind, least, more: {"type": kind, "minimum": least, "maximum": least + more},
        st.sampled_from(["integer", "number", ["integer", "null"]]),
        st.integers(-20, 20),
        st.integers(0, 50),
    ),
    st.sampled_from(
        [{"type": "boolean"}, {"type": "integer"}, {"type": "number"}, {"type": "null"}]
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.one_of(
                st.none(), st.booleans(), st.integers(-9, 9), st.sampled_from(["", "é", "a,b}"])
            ),
            min_size=1,
            max_size=3,
        ),
    ),
)


@st.composite
def _object(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.sampled_from(["a", "B", "c_d", "é"]), inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required}


values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        _object(inner),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(
            lambda item, least: {"type": "array", "items": item, "minItems": least, "maxItems": 2},
            inner,
            st.integers(0, 2),
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(_object(values))
def test_arguments_for_random_schemas_validate(writer: Writer, schema: Any) -> None:
    written = writer.write([{"name": "f", "parameters": schema}], "f", 0)
    assume(written is not None)
    assert written is not None
    _, (call,) = writer.read(written)
    jsonschema.Draft202012Validator(schema).validate(call.arguments)


def parameters(**properties: Any) -> list[dict[str, Any]]:
    return [{"name": "f", "parameters": {"type": "object", "properties": properties}}]


@pytest.mark.parametrize(
    ("tools", "choice", "problem"),
    [
        (None, "auto", "1 to 128 tools"),
        ([], "auto", "1 to 128 tools"),
        ([NOW], "later", "one of auto, required, none, now"),
        ([NOW, NOW], "auto", "same name"),
        ([{"name": "a b"}], "auto", "'a b'"),
        ([{"name": 5}], "auto", "name 5"),
        ([{"name": "f", "parameters": {"type": "string"}}], "auto", "type object"),
        (parameters(a={"type": "string", "pattern": "x"}), "auto", "'pattern' at f.a"),
        (parameters(a={"type": "string", "format": "date"}), "auto", "'format' at f.a"),
        (parameters(a={"uniqueItems": True}), "auto", "'uniqueItems' at \\$.properties.a"),
        (parameters(a={}), "auto", "type None at f.a"),
        (parameters(a=True), "auto", "schema True at f.a"),
        (parameters(a={"type": "array"}), "auto", "at f.a.items"),
        (parameters(a={"enum": [[1]]}), "auto", "value \\[1\\] at f.a"),
        (parameters(**{"a:b": {"type": "null"}}), "auto", "name 'a:b'"),
        (
            [{"name": "f", "parameters": {"type": "object", "required": ["x"]}}],
            "auto",
            "required name 'x'",
        ),
        (parameters(a={"oneOf": [{"type": "null"}]}), "auto", "type None|oneOf"),
        (parameters(a={"type": "integer", "minimum": 5, "maximum": 2}), "auto", "Unsatisfiable"),
    ],
)
def test_what_cannot_be_enforced_is_named(tools: Any, choice: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"tool_choice.*({problem})"):
        check_tool_choice(tools, choice)


def test_text_may_spell_the_control_tokens(writer: Writer) -> None:
    tools = parameters(a={"enum": ["<escape>}<end_function_call>"]})
    tools[0]["parameters"]["required"] = ["a"]
    written = writer.write(tools, "f", 1)
    assert written is not None
    _, (call,) = writer.read(written)
    assert call.arguments == {"a": "<escape>}<end_function_call>"}


def test_arguments_come_in_the_order_of_the_template(writer: Writer) -> None:
    tools = parameters(b={"type": "null"}, C={"type": "null"}, a={"type": "null"})
    tools[0]["parameters"]["required"] = ["b", "C", "a"]
    written = writer.write(tools, "f", 1)
    assert written is not None
    _, (call,) = writer.read(written)
    assert list(call.arguments) == ["a", "b", "C"]
    rendered = writer.tokenizer.chat.render(
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call.to_message()]},
        ],
        add_generation_prompt=False,
    )
    assert re.search(r"call:f\{a:\w+,b:\w+,C:\w+\}", rendered)
