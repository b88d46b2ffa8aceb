"""Load a server with random requests, many of which are cancelled, and look for what leaks.

python -m tests.serve.soak --time 1200
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import psutil

import gemma3_export
from tests.serve.conftest import Running, running, wait_for
from tests.support.chat_templates import WEATHER, chat_bundle

CLIENTS = 8
ALLOWED = {"200", "400", "429", "left"}
MAX_GROWTH_BYTES = 48_000_000  # beyond what the first third of the time has allocated


@dataclass(kw_only=True)
class Soaked:
    """What happened, and how much the process held after a third of the time and at the end."""

    outcomes: Counter[str] = field(default_factory=Counter)
    rss_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return what is wrong, one line each."""
        found = [f"{name}: {count}" for name, count in self.outcomes.items() if name not in ALLOWED]
        growth = self.rss_bytes[-1] - self.rss_bytes[0]
        if growth > MAX_GROWTH_BYTES:
            found.append(f"memory has grown by {growth / 1e6:.0f} MB")
        if self.descriptors[-1] > self.descriptors[0]:
            found.append(f"open files have grown: {self.descriptors}")
        return found


def soak(served: Running, seconds: float, seed: int = 0) -> Soaked:
    """Run random clients; between the two parts and at the end, everything must be free."""
    found = Soaked()
    for part, share in enumerate((1 / 3, 2 / 3)):
        stop = time.monotonic() + seconds * share
        with ThreadPoolExecutor(CLIENTS) as pool:
            numbers = range(part * CLIENTS, (part + 1) * CLIENTS)
            clients = [pool.submit(_client, served, stop, seed + number) for number in numbers]
            for client in clients:
                found.outcomes += client.result()
        wait_for(served.is_idle)
        wait_for(lambda: not served.server.server_state.connections)
        stats = served.engine.stats()
        assert (stats.cached_tokens, stats.reserved_tokens) == (0, 0)
        process = psutil.Process()
        found.rss_bytes.append(process.memory_info().rss)
        found.descriptors.append(process.num_fds())
    return found


def _client(served: Running, stop: float, seed: int) -> Counter[str]:
    draw, outcomes = random.Random(seed), Counter[str]()
    with served.http as client:
        while time.monotonic() < stop:
            try:
                outcomes[_ask(client, draw)] += 1
            except httpx.ReadTimeout:
                outcomes["left"] += 1
            except httpx.HTTPError as error:
                outcomes[repr(error)] += 1
    return outcomes


def _ask(client: httpx.Client, draw: random.Random) -> str:
    """Send one random request, and read its answer, a part of it, or nothing."""
    text = " ".join(draw.choices(["sea", "sky", "blue", "and", "wide"], k=draw.randrange(1, 120)))
    asked = {
        "max_tokens": draw.choice([1, 5, 40, 200]),
        "n": draw.choice([1, 1, 1, 3]),
        "temperature": draw.choice([0, 1, 1.5]),
        "stream": draw.random() < 0.6,
        "top_k": draw.choice([0, 20, -1 if draw.random() < 0.1 else 5]),
    }
    if draw.random() < 0.5:
        path = "/v1/chat/completions"
        asked |= {"messages": [{"role": "user", "content": text}], "logprobs": draw.random() < 0.3}
        if draw.random() < 0.2:
            asked |= {"tools": [WEATHER], "tool_choice": draw.choice(["auto", "required"])}
    else:
        path = "/v1/completions"
        asked |= {"prompt": [text] * draw.choice([1, 2])}
        asked |= {"echo": draw.random() < 0.3, "logprobs": draw.choice([None, 1])}
    leaves = draw.random() < 0.4
    wait_s = draw.choice([0.001, 0.01, 0.05]) if leaves and not asked["stream"] else 60.0
    timeout = httpx.Timeout(60.0, read=wait_s)
    with client.stream("POST", path, json=asked, timeout=timeout) as answer:
        if leaves and asked["stream"]:
            chunks = answer.iter_raw()
            for _ in range(draw.randrange(4)):
                next(chunks, None)
            return "left" if answer.status_code == 200 else str(answer.status_code)
        answer.read()
        if b'{"error"' in answer.content and answer.status_code == 200:
            return f"error in a stream: {answer.content[-200:]!r}"
        return str(answer.status_code)


def main() -> None:
    """Soak a server of a tiny model; exit with 1 if something leaks or fails."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--time", type=float, default=1200.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = gemma3_export.load(chat_bundle("functiongemma"), device="cpu", threads=1)
    with running(model, slots=4, queue_limit=8) as served:
        found = soak(served, arguments.time, arguments.seed)
    rss = " to ".join(f"{size / 1e6:.0f}" for size in found.rss_bytes)
    print(f"{dict(found.outcomes)}; memory {rss} MB; threads {threading.active_count()}")
    if problems := found.problems():
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
