"""/openapi.json describes requests and answers as they are."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from gemma3_export import Model
from gemma3_export.serve.errors import CODES
from tests.serve.conftest import NAME, Running, running
from tests.support.chat_templates import WEATHER

USER = {"role": "user", "content": "a"}
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
CALL = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}


def check(description: dict[str, Any], value: Any, schema: dict[str, Any]) -> None:
    whole = {"components": description["components"], **schema}
    jsonschema.Draft202012Validator(whole).validate(value)


@pytest.fixture(scope="module")
def description(served: Running) -> dict[str, Any]:
    return served.http.get("/openapi.json").json()


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (COMPLETION, {"prompt": ["a", "b"], "max_tokens": 3, "logprobs": 2, "echo": True}),
        (COMPLETION, {"prompt": [2, 7], "max_tokens": 0}),
        (COMPLETION, {"prompt": "a", "max_tokens": -1}),
        (COMPLETION, {"prompt": "a", "model": "another"}),
        (CHAT, {"messages": [USER], "max_tokens": 3} | LOGPROBS),
        (CHAT, {"messages": [USER]} | CALL),
        (CHAT, {"messages": [USER], "n": 0}),
    ],
    ids=str,
)
def test_answers_and_errors_match_their_schemas(
    served: Running, description: dict[str, Any], path: str, asked: dict[str, Any]
) -> None:
    if "tools" in asked:
        pytest.importorskip("llguidance")
    answer = served.http.post(path, json=asked)
    operation = description["paths"][path]["post"]
    documented = operation["responses"][str(answer.status_code)]["content"]["application/json"]
    check(description, answer.json(), documented["schema"])
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    if answer.status_code == 400:
        with pytest.raises(jsonschema.ValidationError):
            check(description, asked, body)
    else:
        check(description, asked, body)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{model_id}", "/health", "/ready"])
def test_so_do_the_other_endpoints(served: Running, description: dict[str, Any], path: str) -> None:
    answer = served.http.get(path.format(model_id=NAME))
    documented = description["paths"][path]["get"]["responses"]["200"]["content"]
    check(description, answer.json(), documented["application/json"]["schema"])


def test_every_status_that_the_server_has_is_documented(
    model: Model, description: dict[str, Any]
) -> None:
    for path in (COMPLETION, CHAT):
        documented = description["paths"][path]["post"]["responses"]
        assert {str(status) for status in CODES} - set(documented) == {"401"}
        assert "422" not in documented
    with running(model, key="a") as served:
        protected = served.http.get("/openapi.json").json()
    assert "401" in protected["paths"][COMPLETION]["post"]["responses"]
    assert protected["paths"][COMPLETION]["post"]["security"]
    assert "security" not in protected["paths"]["/health"]["get"]
