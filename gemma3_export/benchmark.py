"""Measure a bundle's runtimes, alone or against a peer in the same run.

Each candidate lives in its own process, so that memory and threads are its own; the candidates take
turns (A B A B), and the one that waits is stopped by a signal, spinning threads included. So a
change of the machine's load strikes both, and ratios mean more than the absolute numbers.

This module imports neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma3_export import errors
from gemma3_export.bundle import RUNTIMES, Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError

__all__ = ["PEERS", "BenchmarkOptions", "describe_machine", "run_benchmark"]

PEERS = ("transformers", "reference")
WARM_UP_TOKENS = 2
TIMES = ("time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s")
PACKAGES = {  # what a candidate needs, and how to get it
    "onnx": (("onnxruntime",), 'pip install "gemma3-export[cpu]"'),
    "torchscript": (("torch",), 'pip install "gemma3-export[export]"'),
    "reference": (("torch",), 'pip install "gemma3-export[export]"'),
    "transformers": (
        ("torch", "transformers"),
        'pip install "gemma3-export[export]" "transformers>=5.23"',
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """What to measure.

    Raises:
        InputError: an option is impossible.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    batch: int = 1
    threads: int | None = None  # None: as many as this process may use
    runtime: str = "onnx"
    device: str = "auto"
    repeat: int = 3
    against: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch", "repeat"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}; it must be at least 1")
        if self.runtime not in RUNTIMES:
            raise InputError(f"unknown runtime {self.runtime!r}; choose {', '.join(RUNTIMES)}")
        if self.against is not None and self.against not in PEERS:
            raise InputError(f"unknown peer {self.against!r}; choose {' or '.join(PEERS)}")
        if self.against == self.runtime:
            raise InputError(f"{self.runtime} cannot be measured against itself; name another")


def run_benchmark(path: Path, options: BenchmarkOptions) -> dict[str, Any]:
    """Measure the bundle at ``path`` and return a report that JSON can hold.

    Raises:
        InputError: the bundle is damaged, or the tokens do not fit its context.
        UnavailableError: a package or the device is missing.
    """
    bundle = Bundle(path)
    bundle.check_sizes()
    check_context(bundle.config, options)
    names = [options.runtime, *([options.against] if options.against else [])]
    for name in names:
        require_packages(name)
    threads = options.threads or available_processors()
    prompts = random_prompts(bundle.config, options)
    machine = describe_machine()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(started_worker(name, path, options.device, threads))
            for name in names
        ]
        for worker in workers:
            worker.measure(prompts[0], min(WARM_UP_TOKENS, options.new_tokens))
        rounds = [
            [worker.measure(prompt, options.new_tokens) for worker in workers] for prompt in prompts
        ]
    measured = [[speeds(one, options) for one in one_round] for one_round in rounds]
    report: dict[str, Any] = {
        "machine": machine,
        "options": asdict(options) | {"threads": threads},
        "candidates": {
            worker.name: worker.facts | summary([one_round[index] for one_round in measured])
            for index, worker in enumerate(workers)
        },
    }
    if options.against is not None:
        report["ratios"] = ratios(measured, [worker.facts for worker in workers])
        report["same_tokens"] = same_tokens(rounds)
    return report


class Worker:
    """A candidate's process; it is stopped whenever nobody waits for it."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process
        self.facts: dict[str, Any] = {}

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Gemma3ExportError(
                f"the benchmark's {self.name} process ended (exit code {self.process.wait()}); "
                "its output above says why. Was there enough memory?"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def measure(self, prompt: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """One measurement, as the worker answers it."""
        return self.ask({"prompt": prompt, "new_tokens": new_tokens})


@contextmanager
def started_worker(name: str, path: Path, device: str, threads: int) -> Iterator[Worker]:
    """A process that has loaded ``name``, and ends with the context."""
    package_root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "gemma3_export.benchmark_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # The same package, wherever it was imported from; both sides get the same threads.
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(
                filter(None, (package_root, os.environ.get("PYTHONPATH")))
            ),
            "OMP_NUM_THREADS": str(threads),
        },
    )
    worker = Worker(name, process)
    try:
        asked = {"name": name, "bundle": str(path.resolve()), "device": device, "threads": threads}
        worker.facts = worker.ask(asked)
        yield worker
    finally:
        process.kill()  # it may be stopped, and has nothing to save
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def check_context(config: Gemma3Config, options: BenchmarkOptions) -> None:
    """Refuse more tokens than the model's context holds.

    Raises:
        InputError: with the limit.
    """
    wanted, limit = options.prompt_tokens + options.new_tokens, config.max_position_embeddings
    if wanted > limit:
        raise InputError(
            f"{options.prompt_tokens} prompt and {options.new_tokens} new tokens are more than "
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


def random_prompts(config: Gemma3Config, options: BenchmarkOptions) -> list[list[list[int]]]:
    """One prompt [B, T] for each repetition, the same for every candidate."""
    generator = np.random.default_rng(0)
    shape = (options.repeat, options.batch, options.prompt_tokens)
    prompts: list[list[list[int]]] = generator.integers(0, config.vocab_size, shape).tolist()
    return prompts


def speeds(measured: dict[str, Any], options: BenchmarkOptions) -> dict[str, float]:
    """Seconds as tokens per second of the whole batch."""
    first_s, decode_s = measured["time_to_first_token_s"], measured["decode_s"]
    return {
        "time_to_first_token_s": first_s,
        "prefill_tokens_per_s": options.batch * options.prompt_tokens / first_s,
        "decode_tokens_per_s": options.batch * options.new_tokens / decode_s,
        "peak_memory_bytes": measured["peak_memory_bytes"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One candidate's rounds."""
    found: dict[str, Any] = {key: spread([one[key] for one in rounds]) for key in TIMES}
    found["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in rounds)
    return found


def ratios(
    rounds: Sequence[Sequence[dict[str, float]]], facts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """How many times faster (or smaller) than the peer; above 1 is better than the peer."""
    pairs = {
        "prefill": [ours["prefill_tokens_per_s"] / p["prefill_tokens_per_s"] for ours, p in rounds],
        "decode": [ours["decode_tokens_per_s"] / p["decode_tokens_per_s"] for ours, p in rounds],
    }
    ours, peer = (
        max(one["peak_memory_bytes"] for one in side) for side in zip(*rounds, strict=True)
    )
    return {key: spread(values) for key, values in pairs.items()} | {
        "load": facts[1]["load_s"] / facts[0]["load_s"],
        "memory": peer / ours,
    }


def same_tokens(rounds: Sequence[Sequence[dict[str, Any]]]) -> float:
    """The share of rows in which both candidates chose the same tokens throughout."""
    equal = [
        our_row == their_row
        for ours, theirs in rounds
        for our_row, their_row in zip(ours["tokens"], theirs["tokens"], strict=True)
    ]
    return statistics.fmean(equal)


def describe_machine() -> dict[str, object]:
    """What the numbers were measured on, without its name."""
    return {
        "processor": processor_name(),
        "processors": available_processors(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def processor_name() -> str:
    """The processor's model as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_processors() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, where the system tells it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
