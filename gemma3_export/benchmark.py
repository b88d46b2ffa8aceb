"""Measure a bundle's runtimes, alone or against peers in the same run.

Each candidate lives in its own process, so that memory and threads are its own; the candidates take
turns (A B C A B C), and those that wait are stopped by a signal, spinning threads included. So a
change of the machine's load strikes all, and ratios mean more than the absolute numbers.

This module imports neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma3_export.benchmark_machine import available_processors, describe_machine, read_bandwidths
from gemma3_export.benchmark_process import Worker, own_worker, peer_worker
from gemma3_export.bundle import RUNTIMES, Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.peers import DEFAULT_PLACE, PEERS, find_peer, parse
from gemma3_export.runtimes.onnx_session import CudaOptions

__all__ = ["OWN_PEERS", "BenchmarkOptions", "run_benchmark"]

OWN_PEERS = ("transformers", "reference")  # they need no environment of their own
WARM_UP_TOKENS = 2
SPREADS = (
    "time_to_first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "busy_processors",
)
PACKAGES = {  # what a candidate needs, and how to get it
    "onnx": (("onnxruntime",), 'pip install "gemma3-export[cpu]"'),
    "torchscript": (("torch",), 'pip install "gemma3-export[export]"'),
    "pt2": (("torch",), 'pip install "gemma3-export[export]"'),
    "reference": (("torch",), 'pip install "gemma3-export[export]"'),
    "transformers": (
        ("torch", "transformers"),
        'pip install "gemma3-export[export]" "transformers>=5.23"',
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """What to measure: every prompt length with every batch.

    Raises:
        InputError: an option is impossible.
    """

    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: int = 64
    batch: tuple[int, ...] = (1,)
    threads: int | None = None  # None: as many as this process may use
    runtime: str = "onnx"
    device: str = "auto"
    cuda: CudaOptions | None = None  # what the bundle's runtime may do on a GPU
    repeat: int = 3
    against: tuple[str, ...] = ()  # OWN_PEERS, or NAME[:FORMAT] of an installed peer
    peers: Path = DEFAULT_PLACE
    weights: str | None = None  # full precision, to measure the quality of every candidate

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch", "repeat", "threads"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number < 1:
                    raise InputError(f"{name} is {number}; it must be at least 1")
        if self.runtime not in RUNTIMES:
            raise InputError(f"unknown runtime {self.runtime!r}; choose {', '.join(RUNTIMES)}")
        for spec in self.against:
            if spec == self.runtime or self.against.count(spec) > 1:
                raise InputError(f"{spec} cannot be measured against itself; name another")
            if spec not in OWN_PEERS and spec.partition(":")[0] not in PEERS:
                choices = ", ".join((*OWN_PEERS, *PEERS))
                raise InputError(f"unknown peer {spec!r}; choose among {choices}")
            if spec not in OWN_PEERS:
                parse(spec)

    def cases(self) -> list[tuple[int, int]]:
        """Prompt tokens and batch of each case, the smallest first: peak memory only grows."""
        return sorted(
            {(prompt, batch) for prompt in self.prompt_tokens for batch in self.batch},
            key=lambda case: case[0] * case[1],
        )


def run_benchmark(path: Path, options: BenchmarkOptions) -> dict[str, Any]:
    """Measure the bundle at ``path`` and return a report that JSON can hold.

    Raises:
        InputError: the bundle is damaged, the tokens do not fit its context, or a peer has other
            weights.
        UnavailableError: a package, a peer or the device is missing.
    """
    bundle = Bundle(path)
    bundle.check_sizes()
    check_context(bundle.config, options)
    threads = options.threads or available_processors()
    candidates = prepare(bundle, options, threads)
    machine = describe_machine()
    bandwidths = read_bandwidths(threads)
    with ExitStack() as stack:
        workers = [stack.enter_context(candidate) for candidate in candidates]
        measured = [
            measure_case(workers, random_prompts(bundle.config, case, 1 + options.repeat), options)
            for case in options.cases()
        ]
        bandwidths += read_bandwidths(threads)
        cases = [
            describe_case(workers, case, rounds, options, max(bandwidths))
            for case, rounds in zip(options.cases(), measured, strict=True)
        ]
        report: dict[str, Any] = {
            "machine": machine | {"read_bytes_per_s": spread(bandwidths)},
            "options": asdict(options) | {"threads": threads, "peers": str(options.peers)},
            "candidates": {worker.name: worker.facts for worker in workers},
            "cases": cases,
        }
        if options.weights is not None:
            from gemma3_export.benchmark_quality import measure_quality

            report["quality"] = measure_quality(bundle, workers, options.weights, threads)
    return report


def prepare(
    bundle: Bundle, options: BenchmarkOptions, threads: int
) -> list[AbstractContextManager[Worker]]:
    """What starts each candidate; everything that can be refused before is refused here."""
    found: list[AbstractContextManager[Worker]] = []
    for spec in (options.runtime, *options.against):
        if spec in PACKAGES:
            require_packages(spec)
            asked: dict[str, Any] = {
                "name": spec,
                "bundle": str(bundle.path.resolve()),
                "device": options.device,
            }
            if spec == options.runtime and options.cuda is not None:
                asked["cuda"] = asdict(options.cuda)
            found.append(own_worker(spec, asked | {"threads": threads}))
        else:
            peer = find_peer(spec, options.peers)
            peer.check_weights(bundle.manifest.source)
            found.append(peer_worker(peer, threads))
    return found


def check_context(config: Gemma3Config, options: BenchmarkOptions) -> None:
    """Refuse more tokens than the model's context holds.

    Raises:
        InputError: with the limit.
    """
    longest, limit = max(options.prompt_tokens), config.max_position_embeddings
    if longest + options.new_tokens > limit:
        raise InputError(
            f"{longest} prompt and {options.new_tokens} new tokens are more than "
            f"the model's context of {limit}; ask for fewer"
        )


def require_packages(name: str) -> None:
    """Complain before anything is started.

    Raises:
        UnavailableError: with the command that installs what is missing.
    """
    packages, command = PACKAGES[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UnavailableError(f"measuring {name} needs {' and '.join(missing)}; run: {command}")


def random_prompts(
    config: Gemma3Config, case: tuple[int, int], count: int
) -> list[list[list[int]]]:
    """``count`` prompts [B, T], the same for every candidate."""
    prompt_tokens, batch = case
    generator = np.random.default_rng(0)
    shape = (count, batch, prompt_tokens)
    prompts: list[list[list[int]]] = generator.integers(0, config.vocab_size, shape).tolist()
    return prompts


def measure_case(
    workers: Sequence[Worker], prompts: Sequence[list[list[int]]], options: BenchmarkOptions
) -> list[list[dict[str, Any]]]:
    """Rounds in which every worker has one turn, after a first turn that does not count.

    No prompt comes twice: an engine that keeps the cache of known prefixes would answer at once.
    """
    warm_up, *measured = prompts
    for worker in workers:
        worker.measure(warm_up, min(WARM_UP_TOKENS, options.new_tokens))
    return [
        [worker.measure(prompt, options.new_tokens) for worker in workers] for prompt in measured
    ]


def describe_case(
    workers: Sequence[Worker],
    case: tuple[int, int],
    rounds: Sequence[Sequence[dict[str, Any]]],
    options: BenchmarkOptions,
    bandwidth: float,
) -> dict[str, Any]:
    """Speeds of all candidates, and how the first compares with the others."""
    prompt_tokens, batch = case
    speeds = [
        [speed(one, batch, prompt_tokens, options.new_tokens) for one in one_round]
        for one_round in rounds
    ]
    candidates = {}
    for index, worker in enumerate(workers):
        found = summary([one_round[index] for one_round in speeds])
        if size := worker.facts["describe"].get("bytes_per_token"):
            steps_per_s = found["decode_tokens_per_s"]["median"] / batch
            found["share_of_bandwidth"] = steps_per_s * size / bandwidth
        candidates[worker.name] = found
    described: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "batch": batch,
        "new_tokens": options.new_tokens,
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
