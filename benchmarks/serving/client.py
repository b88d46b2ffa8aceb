"""Clients in a closed loop, and the figures of what they observe."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

from gemma3_export.errors import Gemma3ExportError

__all__ = ["Answer", "Load", "figures", "put_under_load"]

EVENT = "data: "
END = "data: [DONE]"
TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """When a client sent one request, and when each piece of its text arrived, by one clock."""

    sent_s: float
    text_s: tuple[float, ...]
    ended_s: float
    prompt_tokens: int
    new_tokens: int

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to the first text."""
        return self.text_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between adjacent pieces of text."""
        return [later - earlier for earlier, later in pairwise(self.text_s)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The answers of one run, and the processor time that the clients themselves took."""

    answers: tuple[Answer, ...]
    client_s: float


def put_under_load(
    url: str,
    prompts: Sequence[Sequence[int]],
    clients: int,
    new_tokens: int,
    fields: Mapping[str, Any],
) -> Load:
    """Send every prompt once, from ``clients`` that each wait for one answer at a time.

    Args:
        url: of the server.
        prompts: token ids.
        clients: requests in flight at once.
        new_tokens: to generate after each prompt.
        fields: further fields of each request.

    Raises:
        Gemma3ExportError: the server failed, or did not generate ``new_tokens``.
    """
    return asyncio.run(_run(url, prompts, clients, new_tokens, fields))


async def _run(
    url: str,
    prompts: Sequence[Sequence[int]],
    clients: int,
    new_tokens: int,
    fields: Mapping[str, Any],
) -> Load:
    waiting, answers = deque(prompts), list[Answer]()
    # A connection per request: a server may close an idle one while the next request is on its way.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    busy = time.process_time()
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as http:

        async def client() -> None:
            while waiting:
                prompt = waiting.popleft()
                answers.append(await _ask(http, prompt, new_tokens, fields))

        try:
            await asyncio.gather(*(client() for _ in range(clients)))
        except httpx.HTTPError as error:
            raise Gemma3ExportError(f"{url} does not answer: {error!r}") from error
    return Load(answers=tuple(answers), client_s=time.process_time() - busy)


async def _ask(
    http: httpx.AsyncClient, prompt: Sequence[int], new_tokens: int, fields: Mapping[str, Any]
) -> Answer:
    """Send one request, and read its stream."""
    body = {
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    text_s, usage = list[float](), dict[str, int]()
    sent_s = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            reason = (await response.aread()).decode(errors="replace")
            raise Gemma3ExportError(f"{http.base_url} answered {response.status_code}: {reason}")
        async for line in response.aiter_lines():
            if line == END or not line.startswith(EVENT):
                continue
            event = json.loads(line[len(EVENT) :])
            if "error" in event:
                raise Gemma3ExportError(f"{http.base_url} failed: {event['error']}")
            if any(choice["text"] for choice in event["choices"]):
                text_s.append(time.perf_counter())
            usage = event.get("usage") or usage
    answer = Answer(
        sent_s=sent_s,
        text_s=tuple(text_s),
        ended_s=time.perf_counter(),
        prompt_tokens=usage.get("prompt_tokens", 0),
        new_tokens=usage.get("completion_tokens", 0),
    )
    _require_complete(answer, len(prompt), new_tokens)
    return answer


def _require_complete(answer: Answer, prompt_tokens: int, new_tokens: int) -> None:
    found = (answer.prompt_tokens, answer.new_tokens)
    if found != (prompt_tokens, new_tokens) or not answer.text_s:
        raise Gemma3ExportError(
            f"a server reports {found[0]} prompt tokens and {found[1]} new ones in "
            f"{len(answer.text_s)} pieces of text, for a request of {prompt_tokens} and "
            f"{new_tokens}, so speeds would not be comparable"
        )


def figures(load: Load) -> dict[str, float]:
    """Return throughput in tokens per second, latencies in milliseconds, and the clients' share.

    ``client_share`` is the part of one processor that the clients took from the server.
    """
    answers = load.answers
    elapsed_s = max(each.ended_s for each in answers) - min(each.sent_s for each in answers)
    new_tokens = sum(each.new_tokens for each in answers)
    prompt_tokens = sum(each.prompt_tokens for each in answers)
    first_s = [each.first_token_s for each in answers]
    gaps_s = [gap for each in answers for gap in each.gaps_s] or [0.0]
    found = {
        "new_tokens_per_s": new_tokens / elapsed_s,
        "tokens_per_s": (prompt_tokens + new_tokens) / elapsed_s,
    }
    for name, values in (("first_token", first_s), ("between_tokens", gaps_s)):
        for percentile in (50, 95):
            found[f"{name}_p{percentile}_ms"] = 1000 * float(np.percentile(values, percentile))
    return found | {"client_share": load.client_s / elapsed_s}
