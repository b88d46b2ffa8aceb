"""The model in Triton generates what Model.generate does, streams, stops and reports errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemma3_export
from gemma3_export import Model
from gemma3_export.bundle import Bundle
from gemma3_export.triton.model_config import RETURN_FLAGS, TritonOptions
from gemma3_export.triton.repository import write_repository
from tests.support import triton_server
from tests.support.chat_templates import chat_bundle
from tests.support.engine_gate import Gate
from tests.support.triton_server import Request, TritonModelException

PROMPT = "The sea is"
GREEDY = {"temperature": 0, "max_tokens": 12}
OPTIONS = TritonOptions(threads=1, slots=2, queue_limit=1, max_tokens=500, kept_prefix_bytes=0)


@pytest.fixture(scope="module")
def model() -> Model:
    return gemma3_export.load(chat_bundle("functiongemma"), device="cpu", threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("triton") / "models"
    return write_repository(Bundle(chat_bundle("functiongemma")), repository, "tiny", OPTIONS)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Hold engines before each step."""
    opened = Gate(monkeypatch)
    yield opened
    opened.open()


@pytest.fixture
def instance(folder: Path) -> Iterator[Any]:
    found = triton_server.load(folder)
    yield found
    found.finalize()


def sampling(**values: Any) -> str:
    return json.dumps(GREEDY | values)


def error_of(instance: Any, **inputs: Any) -> triton_server.TritonError:
    request = Request(**inputs)
    instance.execute([request])
    (response,) = request.all()
    assert response.error is not None
    return response.error


def test_the_text_is_that_of_the_model(instance: Any, model: Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=12)
    whole = Request(text_input=PROMPT, sampling_parameters=sampling())
    only_new = Request(
        text_input=PROMPT, sampling_parameters=sampling(), exclude_input_in_output=True
    )
    instance.execute([whole])
    instance.execute([only_new])
    assert [each.text for each in whole.all()] == [PROMPT + expected.text]
    (response,) = only_new.all()
    assert list(response.tensors) == ["text_output"]
    assert response.text == expected.text


def test_a_stream_has_all_outputs_that_were_asked_for(instance: Any, model: Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=12, temperature=0.9, seed=5, logprobs=2)
    request = Request(
        input_ids=[int(token) for token in model.encode(PROMPT)],
        sampling_parameters=sampling(temperature="0.9", seed=5, logprobs="2"),
        stream=True,
        **dict.fromkeys(RETURN_FLAGS, True),
    )
    instance.execute([request])
    found = request.all()
    assert len(found) > 3
    assert "".join(each.text for each in found) == expected.text
    tokens = [each.tensors["token_ids"] for each in found]
    assert np.concatenate(tokens).tolist() == list(expected.token_ids)
    assert [each.tensors["num_output_tokens"].tolist() for each in found] == [
        [len(each)] for each in tokens
    ]
    reasons = [bytes(each.tensors["finish_reason"][0]).decode() for each in found]
    assert reasons == [""] * (len(found) - 1) + [expected.finish_reason]
    logprobs = [
        entry for each in found for entry in json.loads(each.tensors["logprobs"][0].decode())
    ]
    assert [entry["logprob"] for entry in logprobs] == [token.logprob for token in expected.tokens]
    assert len(logprobs[0]["top"]) == 2
    total = sum(token.logprob or 0 for token in expected.tokens)
    assert found[-1].tensors["cumulative_logprob"].tolist() == pytest.approx([total])
    assert found[0].tensors["num_input_tokens"].tolist() == [expected.prompt_tokens]


def test_parameters_of_a_request_sample_too(instance: Any, model: Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=5)
    request = Request(
        {"max_tokens": 5, "temperature": 0, "triton_enable_empty_final_response": True},
        text_input=PROMPT,
        stream=True,
    )
    instance.execute([request])
    assert "".join(each.text for each in request.all()) == expected.text


def test_a_conversation_is_answered(instance: Any, model: Model) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    expected = model.chat().send("Hello!", max_new_tokens=12)
    request = Request(messages=json.dumps(messages), sampling_parameters=sampling())
    instance.execute([request])
    assert [each.text for each in request.all()] == [expected.text]


def test_requests_run_at_once(instance: Any, model: Model, gate: Gate) -> None:
    prompts = (PROMPT, "A quick brown")
    requests = [
        Request(text_input=prompt, sampling_parameters=sampling(), stream=True)
        for prompt in prompts
    ]
    instance.execute(requests)
    assert gate.arrived.acquire(timeout=triton_server.TIMEOUT_S)
    gate.allow(8)  # both prompts and some tokens
    first = [request.next()[0] for request in requests]
    gate.open()
    for prompt, begun, request in zip(prompts, first, requests, strict=True):
        assert begun is not None
        text = begun.text + "".join(each.text for each in request.all())
        assert text == model.generate(prompt, max_new_tokens=12).text


def test_a_client_that_leaves_frees_its_slot(instance: Any, gate: Gate) -> None:
    request = Request(text_input=PROMPT, sampling_parameters=sampling(max_tokens=500), stream=True)
    instance.execute([request])
    assert gate.arrived.acquire(timeout=triton_server.TIMEOUT_S)
    request.has_left = True
    assert request.was_told.wait(triton_server.TIMEOUT_S)  # 500 tokens take less than a poll
    gate.open()
    last = request.all()[-1]
    assert last.error is not None
    assert last.error.code == "CANCELLED"
    assert instance._engine.stats().finished["cancelled"] == 1


def test_a_full_queue_is_unavailable(instance: Any, gate: Gate) -> None:
    waiting = [Request(text_input=PROMPT, sampling_parameters=sampling()) for _ in range(3)]
    instance.execute(waiting)
    error = error_of(instance, text_input=PROMPT)
    assert error.code == "UNAVAILABLE"
    gate.open()
    assert all(each.all()[0].error is None for each in waiting)


def test_finalize_finishes_what_runs(folder: Path, gate: Gate) -> None:
    instance = triton_server.load(folder)
    request = Request(text_input=PROMPT, sampling_parameters=sampling())
    instance.execute([request])
    gate.open()
    instance.finalize()
    assert [each.error for each in request.all()] == [None]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no prompt"),
        ({"text_input": PROMPT, "input_ids": [1, 2]}, "text_input and input_ids"),
        ({"text_input": b"\xff"}, "UTF-8"),
        ({"text_input": PROMPT, "sampling_parameters": "[1]"}, "JSON object"),
        ({"text_input": PROMPT, "sampling_parameters": "{"}, "not valid JSON"),
        ({"text_input": PROMPT, "sampling_parameters": '{"best": 1}'}, "best is not supported"),
        ({"text_input": PROMPT, "sampling_parameters": '{"n": 2}'}, "n is 2"),
        ({"text_input": PROMPT, "sampling_parameters": '{"max_tokens": 501}'}, "from 0 to 500"),
        ({"text_input": PROMPT, "sampling_parameters": '{"max_tokens": 0}'}, "at least 1"),
        ({"text_input": PROMPT, "sampling_parameters": '{"top_p": "x"}'}, "top_p"),
        ({"text_input": PROMPT, "sampling_parameters": '{"top_p": 7}'}, "top_p is 7"),
        ({"text_input": PROMPT, "sampling_parameters": '{"echo": true}'}, "inputs are tensors"),
        ({"input_ids": [10**9]}, "1000000000"),
        ({"input_ids": [5] * 5000}, "shorten the prompt"),
        ({"messages": "[]"}, "messages is empty"),
        ({"messages": "1", "exclude_input_in_output": False}, "messages"),
        ({"text_input": PROMPT, "stream": [True, True]}, "stream has 2 elements"),
        (
            {"text_input": PROMPT, "stream": True, "exclude_input_in_output": False},
            "exclude_input_in_output",
        ),
    ],
)
def test_what_is_wrong_is_said(instance: Any, inputs: dict[str, Any], message: str) -> None:
    error = error_of(instance, **inputs)
    assert message in error.message
    assert error.code == "INVALID_ARG"


def test_an_old_triton_is_told_from_a_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_server, "NUMPY_WORKS", False)
    with pytest.raises(TritonModelException, match=r"use Triton 24\.12"):
        triton_server.load(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('key: "slots"', 'key: "slotz"', "'slotz', which does not exist"),
        ('string_value: "500"', 'string_value: "many"', "max_tokens is 'many'"),
        ('string_value: "500"', 'string_value: "-1"', "max_tokens is -1"),
    ],
)
def test_wrong_settings_are_named(
    folder: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    copy = tmp_path / "tiny"
    (copy / "1").mkdir(parents=True)
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (copy / "config.pbtxt").write_text(text.replace(old, new), encoding="utf-8")
    (copy / "1/model.py").write_bytes((folder / "1/model.py").read_bytes())
    with pytest.raises(TritonModelException, match=message):
        triton_server.load(copy)
