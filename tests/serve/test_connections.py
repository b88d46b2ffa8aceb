"""Slow, hostile and vanishing clients; keys; a full queue; the end of the server."""

from __future__ import annotations

import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from gemma3_export import InputError, Model
from gemma3_export.serve.settings import ServeOptions, require_key
from tests.serve.conftest import TIMEOUT_S, Running, running, wait_for
from tests.support.engine_gate import Gate

PATH = "/v1/completions"
KEY = "a secret"
LONG: dict[str, Any] = {"prompt": "The sea", "max_tokens": 400, "temperature": 0}
SHORT: dict[str, Any] = {"prompt": "a", "max_tokens": 1}
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000\r\n\r\n"
)


def connect(served: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=TIMEOUT_S)


def read_all(client: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection.

    A close while bytes of the client are unread, or on their way, reaches it as a reset.
    """
    found = b""
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            found += part
    return found


class TestSlowClients:
    def test_bodies_that_do_not_end_keep_nobody_out(self, model: Model) -> None:
        with running(model, slots=2, queue_limit=0, body_s=30.0) as served:
            slow = [connect(served) for _ in range(8)]
            for client in slow:
                client.sendall(HEAD + b"{")
            assert served.http.post(PATH, json=SHORT).status_code == 200
            for client in slow:
                client.close()

    def test_a_body_has_a_deadline_as_a_whole(self, model: Model) -> None:
        with running(model, body_s=0.2) as served, connect(served) as client:
            client.sendall(HEAD)
            stopped = threading.Event()

            def drip() -> None:
                while not stopped.wait(0.05):
                    try:
                        client.sendall(b" ")
                    except OSError:
                        return

            thread = threading.Thread(target=drip)
            thread.start()
            try:
                answer = read_all(client)
            finally:
                stopped.set()
                thread.join()
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"body_timeout"' in answer

    @pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc"])
    def test_headers_have_a_deadline(self, model: Model, sent: bytes) -> None:
        with running(model, header_s=0.1) as served:
            with connect(served) as client:
                client.sendall(sent)
                assert read_all(client) == b""
            assert served.http.get("/health").status_code == 200

    def test_the_deadline_for_headers_does_not_end_answers(self, model: Model) -> None:
        with running(model, header_s=0.05) as served:
            answer = served.http.post(PATH, json=LONG)
            assert answer.json()["usage"]["completion_tokens"] > 100


class TestVanishingClients:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_frees_its_slot_within_a_step(
        self, model: Model, gate: Gate, stream: bool
    ) -> None:
        with running(model) as served:
            body = json.dumps(LONG | {"stream": stream}).encode()
            with connect(served) as client:
                client.sendall(HEAD.replace(b"1000", str(len(body)).encode()) + body)
                assert gate.arrived.acquire(timeout=TIMEOUT_S)
                gate.allow()  # the prompt
                assert gate.arrived.acquire(timeout=TIMEOUT_S)
                assert served.engine.stats().running == 1
            wait_for(lambda: served.engine._worker._inbox.qsize() > 0)
            gate.open()  # the step that was running, and whatever follows
            wait_for(served.is_idle)
            assert served.engine.stats().new_tokens <= 2
            assert served.engine.stats().finished == {"cancelled": 1}


class TestQueue:
    def test_a_full_queue_gets_429_and_is_as_full_as_before(self, model: Model, gate: Gate) -> None:
        with running(model, slots=1, queue_limit=1) as served, ThreadPoolExecutor() as pool:
            running_requests = []
            for count in (1, 2):
                running_requests.append(
                    pool.submit(lambda: served.http.post(PATH, json=SHORT).status_code)
                )
                wait_for(lambda count=count: _count(served) == count)
            answer = served.http.post(PATH, json=SHORT)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "queue_full"
            assert _count(served) == 2
            gate.open()
            assert [each.result() for each in running_requests] == [200, 200]

    def test_a_request_is_accepted_with_all_its_choices_or_not_at_all(
        self, model: Model, gate: Gate
    ) -> None:
        with running(model, slots=1, queue_limit=2) as served:
            assert served.http.post(PATH, json=SHORT | {"n": 4}).status_code == 429
            gate.open()
            wait_for(served.is_idle)
            assert served.http.post(PATH, json=SHORT | {"n": 3}).status_code == 200


def _count(served: Running) -> int:
    stats = served.engine.stats()
    return stats.running + stats.waiting


class TestTimeLimit:
    def test_an_answer_that_takes_too_long_ends_with_an_error(
        self, model: Model, gate: Gate
    ) -> None:
        with running(model, request_s=0.1) as served:
            answer = served.http.post(PATH, json=LONG)
            assert answer.status_code == 504
            streamed = served.http.post(PATH, json=LONG | {"stream": True})
            assert streamed.status_code == 200
            (event,) = streamed.text.strip().split("\n\n")
            assert json.loads(event.removeprefix("data: "))["error"]["code"] == "request_timeout"
            gate.open()
            wait_for(served.is_idle)


class TestKeys:
    def test_all_but_probes_and_the_page_need_the_key(self, model: Model) -> None:
        with running(model, key=KEY) as served:
            for path in ("/metrics", "/v1/models", "/openapi.json", "/v1/nothing"):
                with served.http as client:
                    assert client.get(path, headers={"Authorization": ""}).status_code == 401
                    assert client.get(path, headers={"Authorization": KEY}).status_code == 401
                    wrong = client.get(path, headers={"Authorization": f"Bearer {KEY}x"})
                    assert wrong.status_code == 401
                    assert wrong.json()["error"]["code"] == "invalid_api_key"
            with served.http as client:
                assert client.post(PATH, json=SHORT).status_code == 200
                bad = {"Authorization": b"Bearer \xe9"}
                assert client.get("/v1/models", headers=bad).status_code == 401
                for path in ("/health", "/ready", "/"):
                    assert client.get(path, headers={"Authorization": ""}).status_code == 200

    def test_keys_are_compared_in_constant_time(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared: list[tuple[bytes, bytes]] = []

        def compare(sent: bytes, key: bytes) -> bool:
            compared.append((sent, key))
            return False

        monkeypatch.setattr("hmac.compare_digest", compare)
        with running(model, key=KEY) as served:
            for sent in (KEY, "x"):
                answer = served.http.get("/v1/models", headers={"Authorization": f"Bearer {sent}"})
                assert answer.status_code == 401
        assert compared == [(KEY.encode(), KEY.encode()), (b"x", KEY.encode())]

    def test_without_a_key_the_server_has_no_other_names_than_localhost(
        self, served: Running
    ) -> None:
        with served.http as client:
            assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
            assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200

    def test_no_other_site_may_read_an_answer(self, served: Running) -> None:
        with served.http as client:
            answer = client.options(
                PATH,
                headers={
                    "Origin": "https://evil.example",
                    "Access-Control-Request-Method": "POST",
                },
            )
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
    def test_other_addresses_need_a_key(self, host: str) -> None:
        with pytest.raises(InputError, match="GEMMA3_API_KEY"):
            require_key(host, None)
        require_key(host, KEY)

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
    def test_local_addresses_need_none(self, host: str) -> None:
        require_key(host, None)

    @pytest.mark.parametrize("key", ["", " ", "a\nb", "ä"])
    def test_a_key_must_fit_into_a_header(self, key: str) -> None:
        with pytest.raises(InputError, match="API key"):
            ServeOptions(model_name="a", key=key)


class TestLogs:
    def test_a_request_keeps_its_id_if_that_is_sane(self, served: Running) -> None:
        with served.http as client:
            kept = client.get("/health", headers={"X-Request-Id": "abc-1.2"})
            assert kept.headers["x-request-id"] == "abc-1.2"
            for wrong in ("a b", "x" * 129, "<script>"):
                made = client.get("/health", headers={"X-Request-Id": wrong})
                assert made.headers["x-request-id"] not in (wrong, "")

    def test_a_request_is_one_line_without_its_texts(
        self, served: Running, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "gemma3_export.serve"):
            served.http.post(PATH, json=SHORT | {"prompt": "a secret prompt"})
            wait_for(lambda: caplog.records)
        (record,) = caplog.records
        facts = record.facts  # type: ignore[attr-defined]
        assert (facts["status"], facts["completion_tokens"]) == (200, 1)
        assert "secret" not in json.dumps(facts)


class TestMetrics:
    def test_they_count_what_was_done(self, model: Model) -> None:
        with running(model, key="secret") as served, served.http as client:
            assert client.post(PATH, json=SHORT | {"n": 2}).status_code == 200
            assert client.post(PATH, json={}).status_code == 400
            for path in (PATH, "/wp-login.php"):
                assert httpx.post(served.url + path, trust_env=False).status_code == 401
            text = client.get("/metrics").text
        for line in (
            'vllm:num_requests_running{model_name="tiny-it"} 0.0',
            'vllm:generation_tokens_total{model_name="tiny-it"} 2.0',
            'vllm:time_to_first_token_seconds_count{model_name="tiny-it"} 2.0',
            'vllm:e2e_request_latency_seconds_count{model_name="tiny-it"} 1.0',
            'vllm:request_success_total{finished_reason="length",model_name="tiny-it"} 2.0',
            'http_requests_total{model_name="tiny-it",path="/v1/completions",status="400"} 1.0',
            'http_requests_total{model_name="tiny-it",path="/v1/completions",status="401"} 1.0',
            'http_requests_total{model_name="tiny-it",path="none",status="401"} 1.0',
        ):
            assert line in text.splitlines()


class TestEnd:
    def test_running_requests_finish_and_new_ones_are_turned_away(
        self, model: Model, gate: Gate
    ) -> None:
        with running(model, drain_s=TIMEOUT_S) as served, ThreadPoolExecutor() as pool:
            last = pool.submit(lambda: served.http.post(PATH, json=SHORT))
            assert gate.arrived.acquire(timeout=TIMEOUT_S)
            with served.http as client:
                assert client.get("/ready").status_code == 200
                served.stop()
                late = client.post(PATH, json=SHORT)
                assert late.status_code == 503
                assert "retry-after" in late.headers
                assert client.get("/ready").status_code == 503
                assert client.get("/health").status_code == 200
            gate.open()
            assert last.result().status_code == 200
            served.thread.join(TIMEOUT_S)
            assert served.server.exit_code == 0

    def test_a_second_signal_ends_them(self, model: Model, gate: Gate) -> None:
        with running(model, drain_s=TIMEOUT_S) as served, ThreadPoolExecutor() as pool:
            last = pool.submit(lambda: served.http.post(PATH, json=LONG))
            assert gate.arrived.acquire(timeout=TIMEOUT_S)
            served.stop()
            served.stop()
            wait_for(lambda: not served.engine.is_open)
            gate.open()
            assert last.result().status_code == 503
            served.thread.join(TIMEOUT_S)
            assert served.server.exit_code == 143

    def test_a_stopped_engine_is_neither_ready_nor_healthy(self, model: Model) -> None:
        with running(model) as served:
            served.engine.close()
            assert served.http.get("/ready").status_code == 503
            assert served.http.get("/health").status_code == 503
            assert served.http.post(PATH, json=SHORT).status_code == 503
