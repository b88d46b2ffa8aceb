"""`serve --ray` and `serve run` on a real Ray cluster of one machine: `make test-ray`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.environments import free_port
from tests.serve.conftest import wait_for
from tests.support.chat_templates import chat_bundle
from tests.support.command_line import REPOSITORY

PYTHON = os.environ.get("GEMMA3_RAY_PYTHON")
PATH = "/v1/completions"
TIMEOUT_S = 240.0  # a safety net
LONG: dict[str, Any] = {"max_tokens": 800, "temperature": 0}
PROMPTS = [f"sea {number}" for number in range(6)]
ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "RAY_USAGE_STATS_ENABLED": "0",
    # `serve run` gives up on a proxy that does not start within three times 5 s on a busy machine
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs Ray; run: make test-ray"),
]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A server with replicas on Ray, and its processes."""

    process: subprocess.Popen[str]
    url: str

    @property
    def http(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=100)
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, trust_env=False, limits=limits)

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of the replicas that are ready or start."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if re.match(r"ray::ServeReplica:.*:engines", "".join(each.cmdline()[:1])):
                    found.append(each)
        return found

    def count(self, name: str) -> float:
        """Return a metric, summed over replicas."""
        with self.http as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def launched(log: Path, *command: object) -> Iterator[subprocess.Popen[str]]:
    """Start a program of the environment with Ray; nothing of it is left afterwards."""
    assert PYTHON is not None
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [PYTHON, *map(str, command)],
            env=os.environ | ENVIRONMENT,
            stdout=stderr,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    children: list[psutil.Process] = []
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TIMEOUT_S)
        for each in children:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()


def wait_until_says(text: str, log: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a text in the log of a program that should still run then."""
    wait_for(lambda: text in log.read_text() or process.poll() is not None, TIMEOUT_S)
    assert text in log.read_text(), log.read_text()


@contextmanager
def serving(log: Path, *options: object) -> Iterator[Cluster]:
    """Run ``serve --ray``."""
    bundle = chat_bundle("functiongemma")
    command = ("-m", "gemma3_export", "serve", bundle, "--ray", "--port", 0, *options)
    with launched(log, *command) as process:
        wait_until_says("listening", log, process)
        (line,) = [line for line in log.read_text().splitlines() if "listening" in line]
        yield Cluster(process=process, url=json.loads(line)["url"])


def ask(cluster: Cluster, prompt: str) -> str:
    """Return the text of an answer."""
    with cluster.http as client:
        answer = client.post(PATH, json=LONG | {"prompt": prompt})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def ask_for_stream(cluster: Cluster, prompt: str, begun: threading.Event | None) -> tuple[str, str]:
    """Return the text of a stream, and its error or an empty text."""
    text, error = "", "ended without [DONE]"
    body = LONG | {"prompt": prompt, "stream": True}
    with cluster.http as client, client.stream("POST", PATH, json=body) as lines:
        for line in lines.iter_lines():
            if line == "data: [DONE]":
                error = ""
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return text, event["error"]["message"]
                text += event["choices"][0]["text"]
                if begun is not None:
                    begun.set()
    return text, error


def test_a_killed_replica_costs_no_answer_that_has_not_begun(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--replicas", 2, "--threads", 1, "--slots", 1)  # so that most requests wait
    with serving(log, *options) as cluster, ThreadPoolExecutor(48) as pool:
        expected = {prompt: ask(cluster, prompt) for prompt in PROMPTS}
        begun = threading.Event()
        whole = [(prompt, pool.submit(ask, cluster, prompt)) for prompt in PROMPTS * 4]
        streams = [
            (prompt, pool.submit(ask_for_stream, cluster, prompt, begun)) for prompt in PROMPTS * 4
        ]
        assert begun.wait(TIMEOUT_S)
        victim = cluster.replicas()[0]
        victim.kill()
        assert all(answer.result() == expected[prompt] for prompt, answer in whole)
        outcomes = Counter(
            _outcome(*answer.result(), expected[prompt]) for prompt, answer in streams
        )
        assert set(outcomes) <= {"complete", "begun, then an error"}, outcomes
        assert cluster.count("gemma3_export:request_retries_total") > 0
        wait_for(lambda: len(cluster.replicas()) == 2, TIMEOUT_S)
        assert victim.pid not in [each.pid for each in cluster.replicas()]
        assert ask(cluster, PROMPTS[0]) == expected[PROMPTS[0]]


def _outcome(text: str, error: str, expected: str) -> str:
    if not error and text == expected:
        return "complete"
    if text and "replica died" in error and expected.startswith(text):
        return "begun, then an error"
    return f"{text!r}, {error!r}"


def test_it_streams_cancels_and_ends_like_the_server_in_one_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(log, "--threads", 1, "--queue-limit", 0, "--slots", 2) as cluster:
        assert ask_for_stream(cluster, "a", None) == (ask(cluster, "a"), "")
        # a client that leaves
        body = {"prompt": "sea 1", "max_tokens": 2000, "stream": True, "temperature": 0}
        with cluster.http as client, client.stream("POST", PATH, json=body) as lines:
            next(lines.iter_lines())
        wait_for(lambda: cluster.count("vllm:num_requests_running") == 0)
        assert cluster.count('vllm:request_success_total{finished_reason="cancelled"') == 1
        with cluster.http as client:
            # more choices than a replica has places for
            assert client.post(PATH, json=body | {"stream": False, "n": 3}).status_code == 400
            assert client.get("/").status_code == 200
            assert client.get("/ready").status_code == 200
        # drain, on a Ctrl-C that reaches the whole process group
        with ThreadPoolExecutor() as pool:
            last = pool.submit(ask_for_stream, cluster, "sea 1", begun := threading.Event())
            assert begun.wait(TIMEOUT_S)
            os.killpg(cluster.process.pid, signal.SIGINT)
            assert last.result()[1] == ""
        assert cluster.process.wait(TIMEOUT_S) == 0
        lines_of_log = [json.loads(line) for line in log.read_text().splitlines()]
        assert {line["event"] for line in lines_of_log} == {"listening", "request", "draining"}


def test_serve_run_builds_the_same_application(tmp_path: Path) -> None:
    log = tmp_path / "log"
    build = "gemma3_export.serve.ray_serve:build_app"
    code = "from ray.serve.scripts import cli; cli()"
    bundle = chat_bundle("functiongemma")
    with launched(log, "-c", code, "run", build, f"bundle={bundle}", "replicas=1") as process:
        cluster = Cluster(process=process, url="http://localhost:8000")
        wait_until_says("is ready at", log, process)
        assert ask_for_stream(cluster, "a", None) == (ask(cluster, "a"), "")
        body = {"prompt": "sea 1", "max_tokens": 2000, "stream": True, "temperature": 0}
        with cluster.http as client, client.stream("POST", PATH, json=body) as lines:
            next(lines.iter_lines())
        wait_for(lambda: cluster.count("vllm:num_requests_running") == 0)
        assert cluster.count('vllm:request_success_total{finished_reason="cancelled"') == 1


def test_replicas_are_added_under_load(tmp_path: Path) -> None:
    options = ("--min-replicas", 1, "--max-replicas", 2, "--threads", 1, "--slots", 1)
    with serving(tmp_path / "log", *options) as cluster, ThreadPoolExecutor(8) as pool:
        expected = {prompt: ask(cluster, prompt) for prompt in PROMPTS}
        assert len(cluster.replicas()) == 1
        has_grown = threading.Event()

        def ask_until_it_has_grown(prompt: str) -> None:
            while not has_grown.is_set():
                assert ask(cluster, prompt) == expected[prompt]

        load = [pool.submit(ask_until_it_has_grown, prompt) for prompt in PROMPTS]
        try:
            wait_for(lambda: cluster.count("gemma3_export:replicas") == 2, TIMEOUT_S)
        finally:
            has_grown.set()
        for each in load:
            each.result()


@contextmanager
def head_node(log: Path) -> Iterator[str]:
    """Start a cluster that is not the server's, and return its address."""
    port = free_port()
    start = "from ray.scripts.scripts import main; main()"
    options = ("--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false")
    with launched(log, "-c", start, "start", *options) as process:
        wait_until_says("started", log, process)
        yield f"127.0.0.1:{port}"


@pytest.mark.parametrize("address", ["auto", None])
def test_it_joins_a_cluster_and_leaves_it_running(tmp_path: Path, address: str | None) -> None:
    with head_node(tmp_path / "head") as head:
        options = ("--ray-address", address or head, "--threads", 1)
        with serving(tmp_path / "log", *options) as cluster:
            assert ask_for_stream(cluster, "a", None) == (ask(cluster, "a"), "")
            cluster.process.send_signal(signal.SIGINT)
            assert cluster.process.wait(TIMEOUT_S) == 0
        host, port = head.split(":")
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S).close()


def test_an_address_at_which_there_is_no_cluster_is_an_error_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    address = f"127.0.0.1:{free_port()}"
    command = ("-m", "gemma3_export", "serve", chat_bundle("functiongemma"), "--ray")
    with launched(log, *command, "--ray-address", address, "--port", 0) as process:
        assert process.wait(TIMEOUT_S) == 1
    assert f"at '{address}'" in log.read_text()
    assert "Connection refused" in log.read_text()  # found before Ray tries for minutes


def test_replicas_that_do_not_start_are_explained(tmp_path: Path) -> None:
    log = tmp_path / "log"
    bundle = chat_bundle("functiongemma")
    command = ("-m", "gemma3_export", "serve", bundle, "--ray", "--max-request-tokens", 10**6)
    with launched(log, *command, "--port", 0) as process:
        code = process.wait(TIMEOUT_S)
    assert code == 2, log.read_text()
    assert "cannot create a cache of 1000000 tokens" in log.read_text()
