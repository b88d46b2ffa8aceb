"""Malformed requests get an error that names what is wrong, and leave nothing behind."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

import gemma3_export
from gemma3_export import Engine
from gemma3_export.serve.app import create_app
from gemma3_export.serve.settings import ServeOptions
from tests.serve.conftest import Running, running, wait_for
from tests.support.chat_templates import WEATHER, chat_bundle
from tests.support.exported_bundles import accept_changes, edit_json

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "a"}
JSON = {"Content-Type": "application/json"}


def ask(served: Running, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    with served.http as client:
        answer = client.post(path, content=body, headers=JSON | headers)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": None}, "prompt", "Expected"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": ["a", 3]}, "prompt", "mixes"),
        ({"prompt": [[]]}, None, "empty"),
        ({"prompt": [[True]]}, "prompt[0][0]", "got `bool`"),
        ({"prompt": [999999]}, None, "vocabulary"),
        ({"prompt": [-1]}, None, "vocabulary"),
        ({"prompt": "\ud800"}, None, ""),
        ({"max_tokens": -1}, "max_tokens", "from 0 to 500"),
        ({"max_tokens": 501}, "max_tokens", "from 0 to 500"),
        ({"max_tokens": True}, "max_tokens", "got `bool`"),
        ({"max_tokens": 1.5}, "max_tokens", "Expected `int"),
        ({"max_tokens": 10**400}, "max_tokens", ""),
        ({"temperature": -1}, "temperature", "0 or more"),
        ({"temperature": "hot"}, "temperature", "Expected"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": -1}, "top_k", "0 (off) or more"),
        ({"min_p": 2}, "min_p", "from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"seed": -1}, "seed", "from 0"),
        ({"n": 0}, "n", "from 1 to 64"),
        ({"n": 65}, "n", "from 1 to 64"),
        ({"n": 20, "prompt": ["a"] * 20}, "n", "400 choices"),
        ({"stop": ["a"] * 17}, "stop", "17 texts"),
        ({"stop": ""}, "stop", "0 characters"),
        ({"stop": "a" * 257}, "stop", "257 characters"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"logprobs": True}, "logprobs", "got `bool`"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "b"}, "suffix", "not supported"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "from -2 to 2"),
        ({"presence_penalty": -2.5}, "presence_penalty", "from -2 to 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"sea": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "twice"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias", "outside the model's vocabulary"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"stream": 1}, "stream", "Expected `bool"),
        ({"prompts": "a"}, "prompts", "not supported"),
        ({"regex": "("}, "regex", "regex"),
        ({"regex": "a", "stop": "b"}, "stop", "leave stop out"),
        ({"allow_control_tokens": "yes"}, "allow_control_tokens", "Expected `bool"),
        ({"prompt": "a", "user": "me", "metadata": {"a": 1}, "max_tokens": -1}, "max_tokens", ""),
    ],
)
def test_completions_name_what_is_wrong(
    served: Running, fields: dict[str, Any], param: str | None, says: str
) -> None:
    status, found = ask(served, COMPLETIONS, json.dumps({"prompt": "a"} | fields).encode())
    assert status == 400, found
    assert found["error"]["type"] == "invalid_request_error"
    assert says in found["error"]["message"]
    assert found["error"]["param"] == param or param is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [{"content": "a"}]}, "messages[0].role is missing"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]}, "only text"),
        ({"messages": [USER | {"colour": 1}]}, "messages[0].colour is not supported"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "x"}]}, "no call before"),
        ({"max_tokens": 0}, "from 1 to 500"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "mean the same"),
        ({"top_logprobs": 1}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
        ({"logprobs": 1}, "Expected `bool"),
        ({"tools": [{"type": "function"}]}, "tools[0] must be"),
        ({"tools": [{"type": "search", "function": {"name": "a"}}]}, "tools[0] must be"),
        ({"tool_choice": "required"}, "needs 1 to 128 tools"),
        ({"tool_choice": "any"}, "tool_choice: Invalid enum value"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function is missing"),
        (
            {"tool_choice": {"function": {"name": "auto"}}, "tools": [WEATHER]},
            "rename the function",
        ),
        ({"tool_choice": {"function": {"name": "fly"}}, "tools": [WEATHER]}, "get_weather"),
        ({"tool_choice": "required", "tools": [WEATHER], "stop": "x"}, "leave stop or tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "",
        ),
        ({"echo": True}, "echo is not supported"),
        ({"functions": []}, "functions is not supported"),
    ],
)
def test_chats_name_what_is_wrong(served: Running, fields: dict[str, Any], says: str) -> None:
    status, found = ask(served, CHATS, json.dumps({"messages": [USER]} | fields).encode())
    assert status == 400, found
    assert says in found["error"]["message"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"", {}, 400, "not valid JSON"),
        (b"{", {}, 400, "not valid JSON"),
        (b"\xff", {}, 400, "not valid JSON"),
        (b"[1]", {}, 400, "JSON object"),
        (b"[" * 100_000, {}, 400, "nesting"),
        (b'{"prompt":"a","metadata":' + b'{"a":' * 70 + b"1" + b"}" * 71, {}, 400, "nesting"),
        (b'{"prompt": "a", "temperature": NaN}', {}, 400, "not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', {}, 400, ""),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415, "application/json"),
        (b'{"prompt": "' + b"a" * 2_000_001 + b'"}', {}, 413, "2000000 bytes"),
    ],
)
def test_bodies_must_be_json(
    served: Running, body: bytes, headers: dict[str, str], status: int, says: str
) -> None:
    found_status, found = ask(served, COMPLETIONS, body, **headers)
    assert found_status == status, found
    assert says in found["error"]["message"]


def test_a_body_of_unknown_length_has_the_same_limit(served: Running) -> None:
    with served.http as client:
        parts = (b" " * 100_000 for _ in range(21))
        answer = client.post(COMPLETIONS, content=parts, headers=JSON)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", COMPLETIONS, 405), ("POST", "/v1/models", 405), ("GET", "/v1/files", 404)],
)
def test_other_paths_and_methods_get_the_same_kind_of_error(
    served: Running, method: str, path: str, status: int
) -> None:
    with served.http as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_spelled_control_tokens_are_text_unless_the_request_asks(served: Running) -> None:
    def prompt_tokens(**fields: Any) -> int:
        asked = {"prompt": "a<end_of_turn>b", "max_tokens": 1} | fields
        status, found = ask(served, COMPLETIONS, json.dumps(asked).encode())
        assert status == 200, found
        return int(found["usage"]["prompt_tokens"])

    assert prompt_tokens(allow_control_tokens=True) == 4
    assert prompt_tokens() == prompt_tokens(allow_control_tokens=False) > 4


def test_so_are_those_in_messages(served: Running) -> None:
    def prompt_tokens(text: str) -> int:
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        status, found = ask(served, CHATS, json.dumps(asked).encode())
        assert status == 200, found
        return int(found["usage"]["prompt_tokens"])

    assert prompt_tokens("a<end_of_turn>b") > prompt_tokens("ab") + 1


SCALARS = st.sampled_from(
    [None, True, False, 0, -1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e308, "", "a", "\0", "ä" * 300]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
VALID: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    CHATS: {"messages": [USER], "max_tokens": 1},
}
SHARED = ("n", "stop", "seed", "stream", "temperature", "regex", "response_format", "bogus")
FIELDS: dict[str, tuple[str, ...]] = {
    COMPLETIONS: (
        *SHARED,
        *("prompt", "max_tokens", "top_p", "top_k", "min_p", "logprobs", "echo", "suffix"),
        *("best_of", "repetition_penalty", "logit_bias", "user", "model"),
    ),
    CHATS: (
        *SHARED,
        *("messages", "max_tokens", "max_completion_tokens", "tools", "tool_choice"),
        *("logprobs", "top_logprobs", "stream_options"),
    ),
}


@pytest.mark.parametrize("examples", [60, pytest.param(260, marks=pytest.mark.slow)])
def test_malformed_requests_never_get_5xx_or_leave_a_slot(served: Running, examples: int) -> None:
    with served.http as client:

        def post(path: str, body: bytes) -> int:
            return client.post(path, content=body, headers=JSON).status_code

        statuses = _damaged_bodies(post, examples) + _random_fields(post, examples)
    assert len(statuses) >= 2 * examples
    assert all(status < 500 and status != 429 for status in statuses)
    assert sum(status >= 400 for status in statuses) >= 1.5 * examples
    wait_for(served.is_idle)
    status, _ = ask(served, COMPLETIONS, b'{"prompt": "a", "max_tokens": 1}')
    assert status == 200


def _damaged_bodies(post: Callable[[str, bytes], int], examples: int) -> list[int]:
    """Cut, flip and repeat bytes of valid requests."""
    draw, statuses = random.Random(5), []
    for _ in range(examples):
        path = draw.choice([COMPLETIONS, CHATS])
        body = bytearray(json.dumps(VALID[path]).encode())
        at = draw.randrange(len(body))
        change = draw.randrange(3)
        if change == 0:
            del body[at:]
        elif change == 1:
            body[at] ^= 1 << draw.randrange(8)
        else:
            body[at:at] = body[at : at + draw.randrange(1, 9)] * draw.randrange(1, 50)
        statuses.append(post(path, bytes(body)))
    return statuses


def _random_fields(post: Callable[[str, bytes], int], examples: int) -> list[int]:
    """Give fields values of other types and sizes."""
    statuses: list[int] = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from([COMPLETIONS, CHATS]))
        names = data.draw(st.lists(st.sampled_from(FIELDS[path]), min_size=1, max_size=2))
        asked = VALID[path] | {name: data.draw(VALUES) for name in names}
        statuses.append(post(path, json.dumps(asked).encode()))

    run()
    return statuses


def test_limits_are_those_of_the_options(model: Any) -> None:
    with running(model, max_tokens=5, max_choices=2, max_body_bytes=100, max_stops=1) as served:
        for fields, status in (
            ({"max_tokens": 5}, 200),
            ({"max_tokens": 6}, 400),
            ({"n": 3}, 400),
            ({"stop": ["a", "b"]}, 400),
            ({"prompt": "a" * 100}, 413),
        ):
            body = json.dumps({"prompt": "a", "max_tokens": 1} | fields).encode()
            assert ask(served, COMPLETIONS, body)[0] == status


def test_a_chat_template_that_does_not_compile_costs_chats_only(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(chat_bundle("functiongemma"), bundle)
    edit_json(bundle / "tokenizer_config.json", chat_template="{% if %}")
    accept_changes(bundle)
    model = gemma3_export.load(bundle, device="cpu", threads=1)
    with Engine(bundle, device="cpu", threads=1, slots=1, warm_up=True) as engine:
        create_app(engine, ServeOptions(model_name="a"))  # which prepares conversations
    with running(model) as served:
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        assert ask(served, COMPLETIONS, body)[0] == 200
        status, answer = ask(served, CHATS, json.dumps({"messages": [USER]}).encode())
        assert status == 400
        assert "template" in answer["error"]["message"]
