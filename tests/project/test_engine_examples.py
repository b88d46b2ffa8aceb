"""The examples that put an engine behind HTTP and behind a queue."""

from __future__ import annotations

import asyncio
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gemma3_export
from tests.support.command_line import REPOSITORY

PROMPTS = ["a", "The sea", "is blue"]


async def post(app: Any, body: dict[str, Any]) -> tuple[int, bytes]:
    """Send one request to an ASGI app; return the status and the body."""
    received: list[dict[str, Any]] = []
    done = asyncio.Event()
    data = json.dumps(body).encode()
    messages = iter([{"type": "http.request", "body": data, "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        if message is None:  # the client stays until it has everything
            await done.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message: dict[str, Any]) -> None:
        received.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    done.set()
    status = next(each["status"] for each in received if each["type"] == "http.response.start")
    return status, b"".join(each.get("body", b"") for each in received)


def test_the_fastapi_endpoint_streams_what_a_model_generates(
    ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    monkeypatch.setenv("BUNDLE", str(ort_bundle))
    app = runpy.run_path(str(REPOSITORY / "examples/fastapi/app.py"))["app"]
    model = gemma3_export.load(ort_bundle, device="cpu", threads=1)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            bodies = [{"prompt": prompt, "max_new_tokens": 9} for prompt in PROMPTS]
            answers = await asyncio.gather(*(post(app, body) for body in bodies))
            for prompt, (status, text) in zip(PROMPTS, answers, strict=True):
                alone = model.generate(prompt, max_new_tokens=9)
                assert (status, text.decode()) == (200, alone.text)
            assert (await post(app, {"prompt": "a", "max_new_tokens": 0}))[0] == 422
            assert (await post(app, {"prompt": "sea " * 4000}))[0] == 400

    asyncio.run(run())


def test_the_worker_answers_every_job(ort_bundle: Path) -> None:
    jobs: list[Any] = [{"id": n, "prompt": p} for n, p in enumerate(PROMPTS * 4)]
    jobs = [job | {"options": {"max_new_tokens": 5}} for job in jobs]
    bad = [{"id": 50}, {"id": 51, "prompt": "a", "options": {"top_k": -1}}, 7]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples/worker/worker.py"), str(ort_bundle)],
        input="\n".join(map(json.dumps, jobs + bad)) + "\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    answers = {answer["id"]: answer for answer in map(json.loads, done.stdout.splitlines())}
    assert set(answers) == {*range(len(jobs)), 50, 51, None}
    model = gemma3_export.load(ort_bundle, device="cpu")
    for job in jobs:
        expected = model.generate(job["prompt"], max_new_tokens=5)
        assert answers[job["id"]]["text"] == expected.text
        assert answers[job["id"]]["finish_reason"] == expected.finish_reason
    assert "top_k is -1" in answers[51]["error"]
    assert all("error" in answers[number] for number in (50, 51, None))
