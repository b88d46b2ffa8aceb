"""A server of a tiny instruction model, in a thread of the test."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import openai
import pytest

import gemma3_export
from gemma3_export import Engine, Model
from gemma3_export.serve.app import create_app
from gemma3_export.serve.server import DrainingServer, bind
from gemma3_export.serve.settings import ServeOptions
from tests.support.chat_templates import chat_bundle
from tests.support.engine_gate import Gate

TIMEOUT_S = 60.0  # a safety net: nothing here takes longer than a second
NAME = "tiny-it"


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server, and how to reach it."""

    engine: Engine
    server: DrainingServer
    thread: threading.Thread
    port: int
    key: str | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def http(self) -> httpx.Client:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, headers=headers, trust_env=False)

    @property
    def openai(self) -> openai.OpenAI:
        client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, http_client=client
        )

    def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)

    def is_idle(self) -> bool:
        """Return whether no request has a slot or waits; polled, as the engine gives no sign."""
        stats = self.engine.stats()
        return not (stats.running or stats.waiting)


@contextmanager
def running(
    model: Model, *, slots: int = 3, queue_limit: int = 64, **options: Any
) -> Iterator[Running]:
    """Serve ``model`` until the block ends."""
    engine = Engine(model, slots=slots, queue_limit=queue_limit)
    listener = bind("127.0.0.1", 0)
    settings = ServeOptions(**{"model_name": NAME, "drain_s": 0.0, "max_tokens": 500} | options)
    server = DrainingServer(
        create_app(engine, settings), settings, partial(engine.aclose, drain=False)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    found = Running(
        engine=engine,
        server=server,
        thread=thread,
        port=listener.getsockname()[1],
        key=settings.key,
    )
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        yield found
    finally:
        engine.close(drain=False)
        found.stop()
        thread.join(TIMEOUT_S)
        listener.close()
        assert not thread.is_alive(), "the server does not end"


def wait_for(is_true: Any, timeout_s: float = TIMEOUT_S) -> None:
    """Poll until something becomes true."""
    event = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if is_true():
            return
        event.wait(0.01)
    raise AssertionError(f"{is_true} is not true after {timeout_s} s")


@pytest.fixture(scope="package")
def model() -> Model:
    return gemma3_export.load(chat_bundle("functiongemma"), device="cpu", threads=1)


@pytest.fixture(scope="package")
def served(model: Model) -> Iterator[Running]:
    """Return a server without a key; tests leave no request behind."""
    with running(model) as found:
        yield found


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Hold engines before each step."""
    opened = Gate(monkeypatch)
    yield opened
    opened.open()
