"""The example service answers, rejects bad requests, and accepts local clients only by default."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import gemma3_export
from gemma3_export.errors import Gemma3ExportError, InputError

SCRIPT = Path(__file__).parents[2] / "examples" / "service" / "serve.py"
KEY = "a key"
TIMEOUT_S = 300  # a safety net: nothing here takes longer than a second
JSON = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def server(example: dict[str, Any], ort_bundle: Path) -> Iterator[Any]:
    engine = example["Engine"](gemma3_export.load(ort_bundle, device="cpu", threads=1))
    server = example["Server"](("127.0.0.1", 0), engine, KEY)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(
    server: Any, path: str, data: bytes | None = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server_port}{path}", data, JSON | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(("options", "expected"), [((), True), (("--no-warm-up",), False)])
def test_it_warms_up_before_it_listens_unless_told_otherwise(
    example: dict[str, Any],
    options: tuple[str, ...],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def load(path: Path, **given: Any) -> None:
        asked.update(given)
        raise InputError("this is far enough")

    monkeypatch.setattr(gemma3_export, "load", load)
    assert CliRunner().invoke(example["main"], ["DIR", *options]).exit_code == 2
    assert asked["warm_up"] is expected


def test_it_continues_a_prompt(server: Any) -> None:
    asked = {"prompt": "hello", "max_new_tokens": 5, "temperature": 0.8, "seed": 3}
    status, found = ask(server, "/generate", json.dumps(asked).encode())
    assert status == 200, found
    assert 1 <= found["new_tokens"] <= 5
    assert found["finish_reason"] in ("length", "stop")
    assert ask(server, "/generate", json.dumps(asked).encode()) == (200, found)
    status, health = ask(server, "/health")
    assert (status, health["status"], health["device"]) == (200, "ok", "cpu")


def test_clients_cannot_write_control_tokens_unless_they_ask(server: Any) -> None:
    asked = {"prompt": "a<end_of_turn>b", "max_new_tokens": 1}
    tokens = []
    for allowed in ({}, {"allow_control_tokens": False}, {"allow_control_tokens": True}):
        status, found = ask(server, "/generate", json.dumps(asked | allowed).encode())
        assert status == 200, found
        tokens.append(found["prompt_tokens"])
    tokenizer = server.engine.model.tokenizer
    assert tokens[0] == tokens[1] == len(tokenizer.encode_ordinary(asked["prompt"])) + 1
    assert tokens[2] == 4


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"{}", {}, 400, "prompt must be a string"),
        (b'{"prompt": 3}', {}, 400, "prompt must be a string"),
        (b'{"prompt": "a", "max_new_tokens": 100000}', {}, 400, "max_new_tokens"),
        (b'{"prompt": "a", "max_new_tokens": true}', {}, 400, "max_new_tokens"),
        (b'{"prompt": "a", "temperature": "hot"}', {}, 400, "temperature"),
        (b'{"prompt": "a", "temperature": NaN}', {}, 400, "temperature"),
        (b'{"prompt": "a", "allow_control_tokens": 1}', {}, 400, "allow_control_tokens"),
        (b'{"prompt": "a", "logprobs": 3}', {}, 400, "logprobs is unknown"),
        (b'{"prompt": "a", "max_tokens": 3}', {}, 400, "choose among prompt, max_new_tokens"),
        (b'{"prompt": "\\ud800"}', {}, 400, ""),
        (b"[1]", {}, 400, "must be an object"),
        (b"{", {}, 400, "not valid JSON"),
        (b"\xff", {}, 400, "not valid JSON"),
        (b"[" * 100_000, {}, 400, "not valid JSON"),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415, "application/json"),
        (b'{"prompt": "a"}', {"Authorization": "Bearer another"}, 401, "key"),
        (b'{"prompt": "a"}', {"Authorization": "Bearer \xe9"}, 401, "key"),
        (b'{"prompt": "a"}', {"Content-Length": "2000000"}, 413, "at most 1,000,000"),
        (b'{"prompt": "a"}', {"Content-Length": "-1"}, 411, "Content-Length"),
    ],
)
def test_bad_requests_are_rejected(
    server: Any, body: bytes, headers: dict[str, str], status: int, says: str
) -> None:
    found_status, found = ask(server, "/generate", body, **headers)
    assert found_status == status
    assert says in found["error"]


def test_other_paths_are_not_found(server: Any) -> None:
    assert ask(server, "/")[0] == 404
    assert ask(server, "/other", b"{}")[0] == 404


def leave_places(server: Any, count: int) -> None:
    """Leave ``count`` of the engine's places free."""
    while server.engine.places.acquire(blocking=False):
        pass
    for _ in range(count):
        server.engine.places.release()


def test_requests_beyond_the_limit_get_429(server: Any) -> None:
    body = json.dumps({"prompt": "a", "max_new_tokens": 1}).encode()
    leave_places(server, 0)
    assert ask(server, "/generate", body)[0] == 429
    leave_places(server, 1)
    assert ask(server, "/generate", body)[0] == 200
    assert ask(server, "/generate", b"{")[0] == 400
    assert ask(server, "/generate", body)[0] == 200, "a place was not given back"


@pytest.mark.parametrize("failure", [None, Gemma3ExportError("broken"), InputError("wrong")])
def test_the_place_is_free_again_before_the_client_has_its_reply(
    server: Any, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    def fail(asked: dict[str, Any]) -> dict[str, Any]:
        raise failure

    def reply(handler: Any, status: int, answer: dict[str, Any]) -> None:
        free.append(server.engine.places.acquire(blocking=False))
        send(handler, status, answer)

    free: list[bool] = []
    send = example["Handler"].reply
    monkeypatch.setattr(example["Handler"], "reply", reply)
    if failure is not None:
        monkeypatch.setattr(server.engine, "answer", fail)
    leave_places(server, 1)
    status, _ = ask(server, "/generate", b'{"prompt": "a", "max_new_tokens": 1}')
    assert status == {type(None): 200, Gemma3ExportError: 500, InputError: 400}[type(failure)]
    assert free == [True]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_other_addresses_need_a_key(example: dict[str, Any], host: str) -> None:
    with pytest.raises(InputError, match="GEMMA3_API_KEY"):
        example["require_key"](host, None)
    with pytest.raises(InputError, match="GEMMA3_API_KEY"):
        example["require_key"](host, "")
    example["require_key"](host, KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_local_addresses_need_no_key(example: dict[str, Any], host: str) -> None:
    example["require_key"](host, None)


def test_the_program_reports_a_folder_that_is_not_a_bundle(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
