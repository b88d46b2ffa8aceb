"""The load test of servers: what it measures of ours, and its figures."""

from __future__ import annotations

import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from benchmarks.serving.__main__ import main, ratios
from benchmarks.serving.client import Answer, Load, figures, put_under_load
from benchmarks.serving.servers import Server, started
from gemma3_export.errors import Gemma3ExportError
from tests.serve.conftest import Running
from tests.support.chat_templates import chat_bundle


def answer(sent_s: float, *text_s: float) -> Answer:
    return Answer(
        sent_s=sent_s,
        text_s=text_s,
        ended_s=text_s[-1] + 0.5,
        prompt_tokens=30,
        new_tokens=len(text_s),
    )


def test_figures_are_those_of_all_answers_together() -> None:
    answers = (answer(10.0, 11.0, 11.2, 11.8), answer(10.5, 13.5))
    assert figures(Load(answers=answers, client_s=0.2)) == {
        "new_tokens_per_s": pytest.approx(4 / 4.0),
        "tokens_per_s": pytest.approx(64 / 4.0),
        "first_token_p50_ms": pytest.approx(2000.0),
        "first_token_p95_ms": pytest.approx(2900.0),
        "between_tokens_p50_ms": pytest.approx(400.0),
        "between_tokens_p95_ms": pytest.approx(580.0),
        "client_share": pytest.approx(0.05),
    }


def test_a_ratio_above_one_means_that_we_are_faster() -> None:
    fast, slow = (
        figures(Load(answers=(answer(0.0, first_s, 2 * first_s),), client_s=0.0))
        for first_s in (1.0, 4.0)
    )
    assert all(each["median"] > 1 for each in ratios([fast], [slow]).values())
    assert all(each["median"] < 1 for each in ratios([slow], [fast]).values())


def test_our_server_is_measured_and_reported(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--prompt-tokens", "21", "--new-tokens", "3", "--clients", "3"]
    options += ["--requests", "4", "--rounds", "2", "--threads", "1", "--report", str(file)]
    bundle = str(chat_bundle("functiongemma"))
    result = CliRunner().invoke(main, [bundle, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    (case,) = report["cases"]
    assert (case["clients"], case["prompt_tokens"], case["requests"]) == (3, 21, 12)
    found = case["servers"]["gemma3-export"]
    assert found["new_tokens_per_s"]["min"] > 0
    all_tokens = found["tokens_per_s"]["max"] / found["new_tokens_per_s"]["max"]
    assert all_tokens == pytest.approx((21 + 3) / 3)
    assert case["ratios"] == {}
    assert "3 clients, prompts of 21 tokens, 3 new tokens, 12 requests" in result.stdout


def test_fewer_tokens_than_asked_for_are_an_error(served: Running) -> None:
    with pytest.raises(Gemma3ExportError, match="3 prompt tokens and 4 new ones"):
        put_under_load(served.url, [[2, 40, 41]], 1, 5, {"max_tokens": 4})


def test_the_reason_of_a_rejected_request_is_shown(served: Running) -> None:
    with pytest.raises(Gemma3ExportError, match=r"answered 400: .*top_kk is not supported"):
        put_under_load(served.url, [[2, 40, 41]] * 3, 2, 5, {"top_kk": 1})


def test_the_output_of_a_server_that_ends_is_shown() -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(Gemma3ExportError, match=r"(?s)x ended with exit code 3.*no such model"),
        started(Server(name="x", command=command)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt-tokens", "2000"], "more than the model's context of 2048"),
        (["--clients", "513"], "1<=x<=512"),
        (["--report", "/nowhere/report.json"], "no folder /nowhere"),
    ],
)
def test_what_cannot_be_measured_is_rejected_first(options: list[str], says: str) -> None:
    result = CliRunner().invoke(main, [str(chat_bundle("functiongemma")), *options])
    assert result.exit_code == 2
    assert says in result.output


def test_no_connection_is_used_twice(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may close one while the next request is on its way."""
    ports = set[Any]()
    original = httpx.AsyncClient.stream

    @asynccontextmanager
    async def noted(*arguments: Any, **options: Any) -> Any:
        async with original(*arguments, **options) as response:
            stream = response.extensions["network_stream"]
            ports.add(stream.get_extra_info("client_addr"))
            yield response

    monkeypatch.setattr(httpx.AsyncClient, "stream", noted)
    put_under_load(served.url, [[2, 40, 41]] * 5, 2, 3, {})
    assert len(ports) == 5
