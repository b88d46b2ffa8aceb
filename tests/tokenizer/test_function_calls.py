"""Function calls in FunctionGemma's format are read exactly, or rejected."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_export.errors import InputError
from gemma3_export.tokenizer import (
    ChatOptions,
    FunctionCall,
    Tokenizer,
    load_tokenizer,
    parse_function_calls,
)
from tests.support.chat_templates import FUNCTION_TOKENS, WEATHER, write_tokenizer

START, END = "<start_function_call>", "<end_function_call>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("fg"), "functiongemma"))


def call(body: str) -> str:
    return f"{START}call:{body}{END}"


def test_a_call_has_a_name_and_arguments() -> None:
    text = call('get_weather{city:<escape>Graz, "AT" {x}: [y]<escape>,days:3}')
    (found,) = parse_function_calls(text)
    assert found == FunctionCall(
        name="get_weather", arguments={"city": 'Graz, "AT" {x}: [y]', "days": 3}
    )


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("<escape><escape>", ""),
        ("<escape> a\n<escape>", " a\n"),
        ("-0.25", -0.25),
        ("1e3", 1000.0),
        ("12345678901234567890", 12345678901234567890),
        ("true", True),
        ("false", False),
        ("null", None),
        ("None", None),
        ("[]", []),
        ("[1,<escape>a,b<escape>,[true]]", [1, "a,b", [True]]),
        ("{}", {}),
        ("{a:{<escape>b:c<escape>:1}, d : 2}", {"a": {"b:c": 1}, "d": 2}),
    ],
)
def test_values_have_the_types_of_json(written: str, value: object) -> None:
    (found,) = parse_function_calls(call(f"f{{v:{written}}}"))
    assert found.arguments == {"v": value}
    assert type(found.arguments["v"]) is type(value)


def test_several_calls_are_in_order_and_other_text_is_ignored() -> None:
    text = f"Well. {call('a{}')} and {call('b.c-d{x:1}')}<start_function_response>"
    assert [found.name for found in parse_function_calls(text)] == ["a", "b.c-d"]
    assert parse_function_calls("call:a{}") == []


@pytest.mark.parametrize(
    "text",
    [
        START,
        f"{START}call:",
        f"{START}call:f",
        f"{START}call:f{{",
        f"{START}call:f{{}}",
        f"{START}call:f{{a",
        f"{START}call:f{{a:",
        f"{START}call:f{{a:<escape>b",
        f"{START}call:f{{a:<escape>b<escape>",
        f"{START}{call('f{}')}",
        f"{START}call:f{{a:<escape>{START}call:g{{}}{END}",
        call("f"),
        call("{}"),
        call("f{} g{}"),
        call("f{a}"),
        call("f{:1}"),
        call("f{a:}"),
        call("f{a:Graz}"),
        call("f{a:1,}"),
        call("f{,a:1}"),
        call("f{a:1 b:2}"),
        call("f{a:1,a:2}"),
        call("f{a:1}}"),
        call("f{a:[1}"),
        call("f{a:[1,]}"),
        call("f{a:1e999}"),
        call("f{a:nan}"),
        call("f{a:0x10}"),
        call("f{a:1_000}"),
        call("f{a:" + "9" * 5000 + "}"),
        call("f{a:<escape>b<escape>c<escape>}"),
        call("f{a:" + "[" * 100_000 + "}"),
        call("f" + "{a:" * 100_000),
        call("f{a:" * 3),
        START + "response:f{}" + END,
        START + '{"name": "f"}' + END,
    ],
    ids=range(36),
)
def test_malformed_calls_are_rejected_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match="function call is malformed") as caught:
        parse_function_calls(text)
    assert len(str(caught.value)) < 400


def test_any_mutation_gives_calls_or_one_error() -> None:
    rng = random.Random(5)
    whole = call("f{a:<escape>b<escape>,c:[1,{d:null}],e:-2.5}") + call("g{}")
    pieces = [*FUNCTION_TOKENS, *"{}[]:,a1.-\n ", "call:"]
    outcomes = set()
    for _ in range(3000):
        text = whole
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            text = (
                text[:at] + rng.choice(pieces) * rng.randint(0, 2) + text[at + rng.randint(0, 9) :]
            )
        try:
            found = parse_function_calls(text)
        except InputError:
            outcomes.add("rejected")
        else:
            outcomes.add("read")
            assert all(isinstance(one.arguments, dict) and one.name for one in found)
    assert outcomes == {"rejected", "read"}


# What the template can write so that it can be read again: it writes no text for None in texts,
# and Python's forms of numbers.
plain_text = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12).filter(
    lambda text: "<" not in text
)
keys = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True)
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    plain_text | numbers | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(arguments=st.dictionaries(keys, values, max_size=4), name=keys)
def test_what_a_template_writes_is_read_back_from_tokens(
    tokenizer: Tokenizer, arguments: dict[str, Any], name: str
) -> None:
    asked = FunctionCall(name=name, arguments=arguments)
    messages: list[Any] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [asked.to_message()]},
    ]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    start = ids.index(tokenizer.token_id(START))
    text, calls = tokenizer.chat.read_answer(ids[start:])
    assert text == ""
    assert calls == [asked]
    assert parse_function_calls(tokenizer.decode(ids[start:])) == [asked]


def test_spelled_tokens_in_an_answer_are_text(tokenizer: Tokenizer) -> None:
    spelled = tokenizer.encode(call("f{}"), add_bos=False, allow_control_tokens=False)
    assert tokenizer.chat.read_answer(spelled) == (call("f{}"), [])
    real = tokenizer.encode(f"{START}call:f{{a:<escape>", add_bos=False)
    ids = [*real, *spelled, *tokenizer.encode(f"<escape>}}{END}", add_bos=False)]
    assert tokenizer.chat.read_answer(ids)[1][0].arguments == {"a": call("f{}")}


def test_the_token_that_ends_an_answer_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"Hm. {call('f{}')}<start_function_response>", add_bos=False)
    text, calls = tokenizer.chat.read_answer(ids)
    assert (text, [found.name for found in calls]) == ("Hm. ", ["f"])


def test_tools_without_a_system_message_get_the_text_that_the_model_needs(
    tokenizer: Tokenizer,
) -> None:
    (opening,) = tokenizer.chat.opening(None, [WEATHER])
    assert opening["role"] == "developer"
    assert "function calling" in str(opening["content"])
    assert tokenizer.chat.opening("S", [WEATHER]) == [{"role": "system", "content": "S"}]
    assert tokenizer.chat.opening(None, None) == []
    rendered = tokenizer.chat.render(
        [opening, {"role": "user", "content": "x"}], ChatOptions(tools=[WEATHER])
    )
    assert rendered.startswith(
        f"<bos><start_of_turn>developer\n{opening['content']}<start_function_declaration>"
    )


def test_numbers_stay_finite() -> None:
    (found,) = parse_function_calls(call("f{a:1e308}"))
    assert math.isfinite(found.arguments["a"])
