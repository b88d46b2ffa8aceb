"""The front of a server on Ray, with replicas in this process; Ray itself is replaced.

tests/serve/test_ray_cluster.py runs the same on a real cluster.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from gemma3_export.api.engine import EngineOptions
from gemma3_export.serve.ray_replica import EngineReplica, ForwardedRequest
from gemma3_export.serve.settings import ServeOptions
from tests.support.chat_templates import chat_bundle

PATH = "/v1/completions"
NAME = "tiny-it"
SHORT: dict[str, Any] = {"prompt": "a", "max_tokens": 7, "temperature": 0}
LONG: dict[str, Any] = {"prompt": "The sea", "max_tokens": 400, "temperature": 0}
STREAM = {"stream": True}


class ReplicaDiedError(Exception):
    """What Ray raises for a replica that has died."""


class QueueIsFullError(Exception):
    """What Ray raises where all replicas have as many requests as they may."""


class UnusedError(Exception):
    """Never raised here."""


@pytest.fixture(scope="module")
def options() -> ServeOptions:
    return ServeOptions(model_name=NAME, key="a key", max_tokens=500)


@pytest.fixture(scope="module")
def replica(options: ServeOptions) -> Iterator[EngineReplica]:
    engine = EngineOptions(slots=2, queue_limit=2, threads=1, device="cpu")
    found = EngineReplica(chat_bundle("functiongemma"), engine, options)
    yield found
    found._engine.close(drain=False)


class Call:
    """A request at a replica, which dies after some messages."""

    def __init__(self, replica: EngineReplica, request: ForwardedRequest, fault: Any) -> None:
        self.request, self.was_cancelled = request, False
        self._batches, self._fault = replica.respond(request), fault

    async def __aiter__(self) -> AsyncIterator[list[Any]]:
        left = self._fault
        if isinstance(left, Exception):
            raise left
        async for batch in self._batches:
            for message in batch:  # one by one, so that a fault can be anywhere
                if left == 0:
                    await self._batches.aclose()
                    raise ReplicaDiedError
                left = None if left is None else left - 1
                yield [message]

    def cancel(self) -> None:
        self.was_cancelled = True
        asyncio.get_running_loop().create_task(self._batches.aclose())  # type: ignore[arg-type]


class Handle:
    """The handle of a deployment with one replica, which has the given faults in turn."""

    def __init__(self, replica: EngineReplica, faults: list[Any]) -> None:
        self._replica, self._faults = replica, faults
        self.calls: list[Call] = []

    def options(self, *, method_name: str, stream: bool) -> Handle:
        assert (method_name, stream) == ("respond", True)
        return self

    def remote(self, request: ForwardedRequest) -> Call:
        fault = self._faults.pop(0) if self._faults else None
        self.calls.append(Call(self._replica, request, fault))
        return self.calls[-1]

    def broadcast(self, method: str) -> Any:
        assert method == "metrics"

        async def results(*, return_exceptions: bool) -> list[Any]:
            assert return_exceptions
            line = 'vllm:num_requests_running{model_name="tiny-it"} '
            head = "# TYPE vllm:num_requests_running gauge\n"
            one, two = (("one", f"{head}{line}1.0\n"), ("two", f"{head}{line}2.0\n"))
            return [one, ReplicaDiedError(), two]

        return SimpleNamespace(results_async=results)


@pytest.fixture
def ray_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions, serving = ModuleType("ray.exceptions"), ModuleType("ray.serve.exceptions")
    exceptions.RayActorError = ReplicaDiedError  # type: ignore[attr-defined]
    serving.BackPressureError = QueueIsFullError  # type: ignore[attr-defined]
    for name in ("NodeDiedError", "WorkerCrashedError", "TaskCancelledError"):
        setattr(exceptions, name, UnusedError)
    serving.RequestCancelledError = UnusedError  # type: ignore[attr-defined]
    for module in (ModuleType("ray"), exceptions, ModuleType("ray.serve"), serving):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "gemma3_export.serve.ray_front", raising=False)


class Client:
    """Sends requests to a front whose replica has faults."""

    def __init__(self, replica: EngineReplica, options: ServeOptions, faults: list[Any]) -> None:
        from gemma3_export.serve import ray_front

        self.handle = Handle(replica, faults)
        self.app, self.front = ray_front.create_front(self.handle, options)

    def send(self, method: str, path: str, key: str | None = "a key", **body: Any) -> Any:
        async def go() -> httpx.Response:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=headers
            ) as client:
                return await client.request(method, path, **({"json": body} if body else {}))

        return asyncio.run(go())

    def post(self, **body: Any) -> Any:
        return self.send("POST", PATH, **body)


@pytest.fixture
def client_with(replica: EngineReplica, options: ServeOptions, ray_modules: None) -> Any:
    return lambda *faults: Client(replica, options, list(faults))


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["text"])


class TestDyingReplicas:
    @pytest.mark.parametrize("fault", [0, 1], ids=["before the status", "before the body"])
    def test_an_answer_that_has_not_begun_comes_from_another_replica(
        self, client_with: Any, fault: int
    ) -> None:
        expected = text_of(client_with().post(**SHORT))
        client = client_with(fault, fault)
        answer = client.post(**SHORT)
        assert (answer.status_code, text_of(answer)) == (200, expected)
        streamed = events(client_with(fault).post(**SHORT, **STREAM))
        assert "".join(each["choices"][0]["text"] for each in streamed[:-1]) == expected
        assert streamed[-1] == "[DONE]"
        retries = 'gemma3_export:request_retries_total{model_name="tiny-it",replica="front"} 2.0'
        assert retries in client.send("GET", "/metrics").text

    def test_a_chat_begins_with_its_first_token(self, client_with: Any) -> None:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, **STREAM}
        found = events(client_with(1).send("POST", "/v1/chat/completions", **body))
        assert found[0]["choices"][0]["delta"]["role"] == "assistant"
        assert found[-1] == "[DONE]"

    def test_a_stream_that_has_begun_ends_with_an_error(self, client_with: Any) -> None:
        client = client_with(3)
        answer = client.post(**LONG, **STREAM)
        assert answer.status_code == 200
        *texts, last = events(answer)
        assert texts
        assert last["error"]["type"] == "service_unavailable_error"
        assert len(client.handle.calls) == 1

    def test_a_request_does_not_kill_all_replicas(self, client_with: Any) -> None:
        client = client_with(0, 0, 0)
        answer = client.post(**SHORT)
        assert answer.status_code == 503
        assert "3 replicas died" in answer.json()["error"]["message"]
        assert len(client.handle.calls) == 3

    def test_if_the_others_are_full_the_request_waits(
        self, client_with: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = client_with(0, QueueIsFullError(), QueueIsFullError())
        monkeypatch.setattr("gemma3_export.serve.ray_front.BUSY_S", 0.001)
        assert client.post(**SHORT).status_code == 200
        assert len(client.handle.calls) == 4


class TestLimits:
    def test_full_queues_are_429(self, client_with: Any) -> None:
        answer = client_with(QueueIsFullError()).post(**SHORT)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert "retry-after" in answer.headers
        assert client_with().post(**LONG, n=5).status_code == 429  # says the replica

    def test_what_is_rejected_early_reaches_no_replica(self, client_with: Any) -> None:
        client = client_with()
        assert client.send("POST", PATH, key="wrong", **SHORT).status_code == 401
        assert client.send("POST", PATH, prompt="a" * 2_000_001).status_code == 413
        assert client.send("GET", "/health", key=None).status_code == 200
        assert not client.handle.calls

    def test_replicas_do_not_see_the_key(self, client_with: Any) -> None:
        client = client_with()
        assert client.post(**SHORT).status_code == 200
        (call,) = client.handle.calls
        headers = dict(call.request.headers)
        assert headers[b"host"] == b"localhost"
        assert b"authorization" not in headers
        assert len(headers[b"x-request-id"]) == 32

    def test_an_answer_that_takes_too_long_is_cancelled(
        self, replica: EngineReplica, ray_modules: None
    ) -> None:
        client = Client(replica, ServeOptions(model_name=NAME, request_s=0.001), [])
        answer = client.post(**LONG)
        assert answer.status_code == 504
        (call,) = client.handle.calls
        assert call.was_cancelled


class TestEnds:
    @pytest.mark.parametrize("body", [LONG | STREAM, LONG | {"n": 2}], ids=["stream", "whole"])
    def test_a_client_that_leaves_cancels_its_request(
        self, client_with: Any, replica: EngineReplica, body: dict[str, Any]
    ) -> None:
        client = client_with()
        before = replica._engine.stats().finished.get("cancelled", 0)

        async def go() -> None:
            data = json.dumps(body).encode()
            arrived = asyncio.Event()
            incoming = [{"type": "http.request", "body": data, "more_body": False}]

            async def receive() -> Any:
                if incoming:
                    return incoming.pop()
                while not replica._engine.stats().running:
                    await asyncio.sleep(0.001)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                arrived.set()

            scope = ForwardedRequest(
                method="POST",
                path=PATH,
                query=b"",
                headers=[
                    (b"authorization", b"Bearer a key"),
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(data)).encode()),
                ],
                body=b"",
            ).scope()
            await client.app(scope, receive, send)
            while replica._engine.stats().running:
                await asyncio.sleep(0.001)

        asyncio.run(go())
        assert client.handle.calls[0].was_cancelled
        assert replica._engine.stats().finished["cancelled"] > before

    def test_a_server_that_stops_ends_its_requests(self, client_with: Any) -> None:
        client = client_with()
        original = client.handle.remote

        def remote(request: ForwardedRequest) -> Call:
            asyncio.get_running_loop().create_task(client.front.aclose())
            return original(request)

        client.handle.remote = remote
        answer = client.post(**LONG)
        assert answer.status_code == 503
        assert "stopped" in answer.json()["error"]["message"]


def test_metrics_of_all_replicas_are_one_page(client_with: Any) -> None:
    text = client_with().send("GET", "/metrics").text
    assert 'gemma3_export:replicas{model_name="tiny-it",replica="front"} 2.0' in text
    lines = [line for line in text.splitlines() if "num_requests_running" in line]
    assert lines[1:] == [
        "# TYPE vllm:num_requests_running gauge",
        'vllm:num_requests_running{model_name="tiny-it",replica="one"} 1.0',
        'vllm:num_requests_running{model_name="tiny-it",replica="two"} 2.0',
    ]


def test_the_log_says_what_the_replica_counted(
    client_with: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "gemma3_export.serve.gate"):
        client_with().post(**SHORT)
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")][-1]
    assert (facts["status"], facts["completion_tokens"]) == (200, 7)
