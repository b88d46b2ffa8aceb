"""Rounds of a benchmark as medians, ranges and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gemma3_export.bench.process import Worker

__all__ = ["describe_case", "ratios", "spread"]

SPREADS = (
    "time_to_first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "busy_processors",
)


def describe_case(
    workers: Sequence[Worker],
    case: tuple[int, int],
    rounds: Sequence[Sequence[dict[str, Any]]],
    new_tokens: int,
    bandwidth: float | None,
) -> dict[str, Any]:
    """Speeds of all candidates, and how the first compares with the others."""
    prompt_tokens, batch = case
    speeds = [
        [speed(one, batch, prompt_tokens, new_tokens) for one in one_round] for one_round in rounds
    ]
    candidates = {}
    for index, worker in enumerate(workers):
        found = summary([one_round[index] for one_round in speeds])
        size = worker.facts["describe"].get("bytes_per_token")
        if size and bandwidth:
            steps_per_s = found["decode_tokens_per_s"]["median"] / batch
            found["share_of_bandwidth"] = steps_per_s * size / bandwidth
        candidates[worker.name] = found
    described: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "batch": batch,
        "new_tokens": new_tokens,
        "candidates": candidates,
    }
    if len(workers) > 1:
        described["ratios"] = {
            worker.name: ratios([(one_round[0], one_round[index]) for one_round in speeds])
            for index, worker in enumerate(workers)
            if index
        }
        described["same_tokens"] = {
            worker.name: same_tokens([(one_round[0], one_round[index]) for one_round in rounds])
            for index, worker in enumerate(workers)
            if index
        }
    return described


def speed(
    measured: dict[str, Any], batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """Seconds as tokens per second of the whole batch."""
    first_s = measured["time_to_first_token_s"]
    return {
        "time_to_first_token_s": first_s,
        "prefill_tokens_per_s": batch * prompt_tokens / first_s,
        "decode_tokens_per_s": batch * new_tokens / measured["decode_s"],
        "busy_processors": measured["busy_processors"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One candidate's rounds."""
    found: dict[str, Any] = {key: spread([one[key] for one in rounds]) for key in SPREADS}
    found["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in rounds)
    return found


def ratios(pairs: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """How many times faster (or smaller) than the peer; above 1 is better than the peer."""
    ours, theirs = (
        max(one["peak_memory_bytes"] for one in side) for side in zip(*pairs, strict=True)
    )
    found: dict[str, Any] = {
        name: spread([our[key] / their[key] for our, their in pairs])
        for name, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s"))
    }
    return found | {"memory": theirs / ours}


def same_tokens(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """The share of rows in which both candidates chose the same tokens throughout."""
    equal = [
        our_row == their_row
        for ours, theirs in pairs
        for our_row, their_row in zip(ours["tokens"], theirs["tokens"], strict=True)
    ]
    return statistics.fmean(equal)
