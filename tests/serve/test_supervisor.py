"""Workers that die or hang are replaced, crash loops end the server, signals pass on."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from gemma3_export import Engine, EngineOptions, Gemma3ExportError, Model
from gemma3_export.serve.server import bind
from gemma3_export.serve.settings import ServeOptions
from gemma3_export.serve.supervisor import RestartPolicy, Supervisor
from gemma3_export.serve.worker import Pulse, WorkerJob, WorkerServer
from tests.serve.conftest import TIMEOUT_S, wait_for
from tests.support.chat_templates import chat_bundle
from tests.support.command_line import error_line, run_rejected, start
from tests.support.engine_gate import Gate

READY = "import os, signal, sys, time\nprint('{\"ready\": true}', flush=True)\n"
FOREVER = "sys.stdin.read()"


def supervised(
    code: str,
    *,
    count: int = 1,
    stop_s: float = TIMEOUT_S,
    silent_s: float = TIMEOUT_S,
    stop_at: Path | None = None,
    stop_again_at: Path | None = None,
) -> int:
    """Run a supervisor of programs, and stop it once the first one is ready.

    Args:
        code: the program.
        count: of workers.
        stop_s: seconds after which they are killed.
        silent_s: seconds after which one that reports nothing is killed.
        stop_at: stop it once this file exists instead.
        stop_again_at: stop it a second time once this file exists.
    """

    async def main() -> int:
        def on_ready() -> None:
            if stop_at is not None:
                check(stop_at)
            else:
                supervisor.stop(signal.SIGTERM)
            if stop_again_at is not None:
                check(stop_again_at)

        def check(path: Path) -> None:
            if path.exists():
                supervisor.stop(signal.SIGTERM)
            else:
                asyncio.get_running_loop().call_later(0.01, check, path)

        supervisor = Supervisor(
            [str(number).encode() for number in range(count)],
            on_ready=on_ready,
            stop_s=stop_s,
            command=(sys.executable, "-c", code),
            policy=RestartPolicy(delays_s=(0, 0.01), early_s=TIMEOUT_S, silent_s=silent_s),
        )
        return await supervisor.run()

    return asyncio.run(main())


class TestRestarts:
    def test_a_worker_that_ends_again_and_again_ends_the_server(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The other one is told to stop."""
        code = (
            "import os, signal, sys\n"
            f"if os.read(0, 9) == b'1':\n    os.kill(os.getpid(), signal.SIGKILL)\n{FOREVER}"
        )
        with pytest.raises(Gemma3ExportError, match=r"worker 1 .* 3 times .* by SIGKILL"):
            supervised(code, count=2)
        ends = [record for record in caplog.records if record.message == "worker ended"]
        assert [record.facts["worker"] for record in ends] == [1, 1, 1]  # type: ignore[attr-defined]

    def test_one_that_hangs_is_replaced_by_one_that_works(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        code = (
            f"{READY}import pathlib\n"
            f"first, second = map(pathlib.Path, {[str(first), str(second)]})\n"
            "if not first.exists():\n"
            "    first.touch()\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "for _ in range(100):\n"  # for longer than it may be silent
            "    print('{\"works\": true}', flush=True)\n    time.sleep(0.01)\n"
            f"second.touch()\n{FOREVER}"
        )
        assert supervised(code, silent_s=0.5, stop_at=second) == 0
        (ended,) = [record for record in caplog.records if record.message == "worker ended"]
        assert ended.facts == {  # type: ignore[attr-defined]
            "worker": 0,
            "cause": "was killed by SIGKILL",
            "reason": "it had reported nothing for 0.5 s",
        }

    def test_what_keeps_the_first_worker_from_starting_is_said_at_once(self) -> None:
        code = 'print(\'{"error": "no such graph", "exit_code": 3}\'); exit(3)'
        with pytest.raises(Gemma3ExportError, match="no such graph") as raised:
            supervised(code)
        assert raised.value.exit_code == 3


class TestEnd:
    def test_workers_drain_at_the_first_signal(self) -> None:
        code = f"import signal\nsignal.signal(signal.SIGTERM, lambda *_: exit(0))\n{READY}{FOREVER}"
        assert supervised(code, count=2) == 0

    def test_the_second_signal_cancels_what_they_do(self, tmp_path: Path) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        code = (
            "import signal, pathlib\ndef handle(*_):\n"
            f"    first, second = map(pathlib.Path, {[str(first), str(second)]})\n"
            "    if not first.exists():\n        return first.touch()\n"
            "    second.touch()\n    exit(143)\n"
            f"signal.signal(signal.SIGTERM, handle)\n{READY}{FOREVER}"
        )
        assert supervised(code, stop_again_at=first) == 143
        assert second.exists()

    def test_workers_that_do_not_end_are_killed(self) -> None:
        code = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}{FOREVER}"
        assert supervised(code, stop_s=0.05) == 128 + signal.SIGTERM


def test_a_worker_says_which_others_answer_and_ends_with_its_engine(
    model: Model, tmp_path: Path
) -> None:
    engine, reports = Engine(model, slots=1), list[Any]()
    serve = ServeOptions(model_name="a")
    job = WorkerJob(path=model.path, engine=EngineOptions(), serve=serve, count=2, folder=tmp_path)
    server = WorkerServer(engine, job, reports.append)
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_for(lambda: len(reports) > 1)
        lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
        engine.close()
        thread.join(TIMEOUT_S)
    assert reports[:2] == [{"ready": True}, {"works": True}]
    for number, up in (("0", "1.0"), ("1", "0.0")):
        assert f'gemma3_export_worker_up{{model_name="a",worker="{number}"}} {up}' in lines
    assert 'vllm:num_requests_running{model_name="a",worker="0"} 0.0' in lines
    assert server.exit_code == 1


def test_an_engine_hangs_if_a_step_does_not_end(model: Model, gate: Gate) -> None:
    with Engine(model, slots=1) as engine:
        pulse = Pulse(engine, step_s=5.0)
        assert pulse.beats(0.0)
        assert pulse.beats(100.0), "idle engines have no steps"
        stream = engine.stream("a", max_new_tokens=3, ignore_eos=True)
        assert pulse.beats(200.0)
        engine.stream("b", max_new_tokens=1)
        assert not pulse.beats(206.0), "new requests are no sign of life"
        gate.allow(2)
        next(stream)
        assert pulse.beats(207.0), "it has gone on"
        gate.open()


class Server:
    """``gemma3-export serve --workers 2`` in processes of its own, with its log."""

    def __init__(self, *arguments: object) -> None:
        bundle = chat_bundle("functiongemma")
        self.process = start("serve", bundle, "--workers", 2, "--port", 0, *arguments)
        self.log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: len(self.events("worker ready")) == 2)
        self.url = self.events("listening")[0]["url"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(map(json.loads, self.process.stderr))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in [*self.log] if line["event"] == name]

    def pids(self) -> dict[int, int]:
        return {line["worker"]: line["pid"] for line in self.events("worker ready")}

    def stream(self) -> openai.Stream[Any]:
        """Open a connection, and return a stream of thousands of tokens on it."""
        http = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http
        )
        return client.completions.create(
            model="chat-functiongemma",
            prompt="a",
            max_tokens=1900,
            stream=True,
            extra_body={"regex": "[a-z ]{8000}"},
        )

    def worker_of(self, stream: openai.Stream[Any]) -> int:
        """Return the worker at the other end of a stream's connection."""
        port = stream.response.extensions["network_stream"].get_extra_info("client_addr")[1]
        (found,) = (
            number
            for number, pid in self.pids().items()
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.raddr and connection.raddr.port == port
        )
        return found


@pytest.fixture
def server() -> Any:
    found = Server("--threads", 1, "--no-warm-up")
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.mark.slow
def test_a_killed_worker_fails_its_streams_and_is_replaced(server: Server) -> None:
    pytest.importorskip("llguidance")
    streams: dict[int, openai.Stream[Any]] = {}
    while len(streams) < 2:
        stream = server.stream()
        streams.setdefault(server.worker_of(stream), stream)
    pid = server.pids()[0]
    next(streams[0])
    psutil.Process(pid).suspend()  # so that the stream cannot end before
    psutil.Process(pid).kill()
    with pytest.raises((httpx.HTTPError, openai.APIError)):
        list(streams[0])
    last = [chunk.choices[0].finish_reason for chunk in streams[1]][-1]
    assert last == "length"

    wait_for(lambda: len(server.events("worker ready")) == 3)
    (ended,) = server.events("worker ended")
    assert (ended["worker"], ended["cause"]) == (0, "was killed by SIGKILL")
    assert server.pids()[0] != pid
    with httpx.Client(base_url=server.url, trust_env=False, timeout=TIMEOUT_S) as client:
        for _ in range(4):
            asked = {"prompt": "a", "max_tokens": 1}
            assert client.post("/v1/completions", json=asked).status_code == 200
        lines = client.get("/metrics").text.splitlines()
        labels = [f'model_name="chat-functiongemma",worker="{number}"' for number in range(2)]
        assert [f"gemma3_export_worker_up{{{each}}} 1.0" in lines for each in labels] == [True] * 2
        assert f"vllm:generation_tokens_total{{{labels[1]}}}" in "".join(lines)
        assert sum(line.startswith("# TYPE vllm:num_requests_running") for line in lines) == 1

    workers = [psutil.Process(each) for each in server.pids().values()]
    server.process.kill()  # and so nobody tells them to stop
    _, alive = psutil.wait_procs(workers, timeout=TIMEOUT_S)
    assert not alive


def test_why_workers_cannot_start_is_one_error() -> None:
    line = error_line(
        "serve", chat_bundle("functiongemma"), "--workers", 2, "--port", 0, "--cache-memory", "1KB"
    )
    assert "20 tokens of the cache" in line


def test_workers_and_ray_exclude_each_other() -> None:
    said = run_rejected("serve", chat_bundle("functiongemma"), "--workers", 2, "--ray")
    assert "use --replicas" in said


def test_a_long_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    line = error_line("serve", chat_bundle("functiongemma"), "--workers", 2, "--port", 0)
    assert "TMPDIR" in line
