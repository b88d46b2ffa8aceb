"""Measure a bundle's runtime, alone or against peers in the same run.

Each candidate runs in its own process, with its own memory and threads. The candidates take turns
(A B C, A B C), and a signal stops those that wait, including threads that spin. A change in the
machine's load therefore affects all of them, and ratios are more reliable than absolute numbers.

This module imports neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma3_export.bench.machine import (
    describe_machine,
    gpu_bandwidths,
    measure_bandwidths,
)
from gemma3_export.bench.peers import DEFAULT_FOLDER, check_peer, find_peer
from gemma3_export.bench.process import Worker, own_worker, peer_worker
from gemma3_export.bench.report import describe_case, spread
from gemma3_export.bundle import RUNTIMES, Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.device import CudaOptions
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import to_path
from gemma3_export.limits import check_integer, check_threads
from gemma3_export.processors import available_processors

__all__ = ["BenchmarkOptions", "run_benchmark"]

WARM_UP_TOKENS = 2
MAX_BATCH = 4096
PACKAGES = {  # what a candidate needs, and how to install it
    "onnx": (("onnxruntime",), 'pip install "gemma3-export[cpu]"'),
    "torchscript": (("torch",), 'pip install "gemma3-export[export]"'),
    "pt2": (("torch",), 'pip install "gemma3-export[export]"'),
    "reference": (("torch",), 'pip install "gemma3-export[export]"'),
} | dict.fromkeys(
    ("transformers", "transformers:static"),
    (("torch", "transformers"), 'pip install "gemma3-export[export]" "transformers>=5.23"'),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """The measurements to make: every prompt length with every batch size.

    Raises:
        InputError: an option is invalid, or a peer is unknown.
    """

    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: int = 64
    batch: tuple[int, ...] = (1,)
    threads: int | None = None  # None: all processors that this process may use
    runtime: str = "onnx"
    variant: str | None = None  # of the bundle's graphs; None: the default
    device: str = "auto"
    cuda: CudaOptions | None = None  # options of the bundle's runtime on a GPU
    huge_pages: bool = True  # of the bundle's runtime
    repeat: int = 3
    against: tuple[str, ...] = ()  # built-in peers, or NAME[:FORMAT] of installed ones
    peers: Path | str = DEFAULT_FOLDER
    weights: str | None = None  # full precision; adds every candidate's divergence from it

    def __post_init__(self) -> None:
        check_threads(self.threads)
        check_integer("new_tokens", self.new_tokens)
        check_integer("repeat", self.repeat)
        for number in self.prompt_tokens:
            check_integer("prompt_tokens", number)
        for number in self.batch:
            check_integer("batch", number, 1, MAX_BATCH)
        if self.runtime not in RUNTIMES:
            raise InputError(f"unknown runtime {self.runtime!r}; choose {', '.join(RUNTIMES)}")
        for spec in self.against:
            if spec == self.runtime or self.against.count(spec) > 1:
                raise InputError(f"{spec} cannot be measured against itself; name another")
            check_peer(spec, to_path(self.peers, "peers"))

    def cases(self) -> list[tuple[int, int]]:
        """Return (prompt tokens, batch) of each case, smallest first: peak memory only grows."""
        return sorted(
            {(prompt, batch) for prompt in self.prompt_tokens for batch in self.batch},
            key=lambda case: case[0] * case[1],
        )


def run_benchmark(path: Path | str, options: BenchmarkOptions) -> dict[str, Any]:
    """Measure the bundle at ``path`` and return a report that JSON can represent.

    Raises:
        InputError: the bundle is damaged, the tokens do not fit its context, or a peer was made
            from other weights.
        UnavailableError: a package, a peer or the device is missing, or this is Windows, where no
            process can be paused while another one is measured.
    """
    if sys.platform == "win32":
        raise UnavailableError(
            "benchmarks do not run on Windows, which cannot pause a process while another one is "
            "measured; run them on Linux, in WSL or on macOS"
        )
    bundle = Bundle(path, options.variant)
    is_reference = options.runtime == "reference"  # takes the weights of any graph
    graph = bundle.first_graph if is_reference else bundle.graph(options.runtime)
    bundle.check_quickly(only_for=graph)
    check_context(bundle.config, options)
    threads = options.threads or available_processors()
    candidates = prepare(bundle, options, threads)
    machine = describe_machine()
    with ExitStack() as stack:
        workers = [stack.enter_context(candidate) for candidate in candidates]
        device = same_device(workers)
        bandwidths, missing = bandwidths_of(device, threads)
        measured = [
            measure_case(workers, random_prompts(bundle.config, case, 1 + options.repeat), options)
            for case in options.cases()
        ]
        bandwidths += bandwidths_of(device, threads)[0]
        fastest = max(bandwidths, default=None)
        cases = [
            describe_case(workers, case, rounds, options.new_tokens, fastest)
            for case, rounds in zip(options.cases(), measured, strict=True)
        ]
        report: dict[str, Any] = {
            "machine": machine
            | {"device": device}
            | {"read_bytes_per_s": spread(bandwidths) if bandwidths else None}
            | ({"read_bytes_missing": missing} if missing else {}),
            "options": asdict(options)
            | {"threads": threads, "peers": str(options.peers), "variant": graph.variant},
            "candidates": {worker.name: worker.facts for worker in workers},
            "cases": cases,
        }
        if options.weights is not None:
            from gemma3_export.bench.quality import measure_divergence

            report["quality"] = measure_divergence(bundle, workers, options.weights, threads)
    return report


def same_device(workers: Sequence[Worker]) -> str:
    """Return the device that all candidates report: ``cpu`` or ``cuda:N``.

    Raises:
        InputError: they use different devices.
    """
    devices = {worker.name: str(worker.facts["describe"].get("device")) for worker in workers}
    kinds = {device.partition(":")[0].lower() for device in devices.values()} - {"none"}
    if len(kinds) > 1:
        raise InputError(
            f"the candidates use different devices ({devices}); pass --device cpu, or leave out "
            "those that cannot use the GPU"
        )
    device = devices[workers[0].name]
    return f"{device}:0" if device == "cuda" else device


def bandwidths_of(device: str, threads: int) -> tuple[list[float], str | None]:
    """Measure several times how fast ``device`` reads its memory, in bytes per second.

    A GPU's memory cannot always be measured. The list is then empty, and the reason is returned
    with it, so that the benchmark can run without the limit.
    """
    if not device.startswith("cuda"):
        return measure_bandwidths(threads), None
    try:
        return gpu_bandwidths(device), None
    except UnavailableError as error:
        return [], str(error)


def prepare(
    bundle: Bundle, options: BenchmarkOptions, threads: int
) -> list[AbstractContextManager[Worker]]:
    """Check everything that can be checked early, and return what starts each candidate."""
    found: list[AbstractContextManager[Worker]] = []
    for spec in (options.runtime, *options.against):
        if spec in PACKAGES:
            require_packages(spec)
            request: dict[str, Any] = {
                "name": spec,
                "bundle": str(bundle.path.resolve()),
                "variant": bundle.variant,
                "device": options.device,
            }
            if spec == options.runtime:
                request["huge_pages"] = options.huge_pages
                if options.cuda is not None:
                    request["cuda"] = asdict(options.cuda)
            found.append(own_worker(spec, request | {"threads": threads}))
        else:
            peer = find_peer(spec, to_path(options.peers))
            peer.check_weights(bundle.manifest.source)
            found.append(peer_worker(peer, threads))
    return found


def check_context(config: Gemma3Config, options: BenchmarkOptions) -> None:
    """Check that the tokens fit the model's context.

    Raises:
        InputError: they do not; the message gives the limit.
    """
    longest, limit = max(options.prompt_tokens), config.max_position_embeddings
    if longest + options.new_tokens > limit:
        raise InputError(
            f"{longest} prompt tokens and {options.new_tokens} new tokens exceed the model's "
            f"context of {limit}; reduce --prompt-tokens or --new-tokens"
        )


def require_packages(name: str) -> None:
    """Check that the packages for a candidate are installed, before anything starts.

    Raises:
        UnavailableError: one is missing; the message gives the command that installs it.
    """
    packages, command = PACKAGES[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UnavailableError(f"measuring {name} needs {' and '.join(missing)}; run: {command}")


def random_prompts(
    config: Gemma3Config, case: tuple[int, int], count: int
) -> list[list[list[int]]]:
    """Draw ``count`` prompts [B, T], the same for every candidate."""
    prompt_tokens, batch = case
    generator = np.random.default_rng(0)
    shape = (count, batch, prompt_tokens)
    prompts: list[list[list[int]]] = generator.integers(0, config.vocab_size, shape).tolist()
    return prompts


def measure_case(
    workers: Sequence[Worker], prompts: Sequence[list[list[int]]], options: BenchmarkOptions
) -> list[list[dict[str, Any]]]:
    """Measure rounds in which every worker has one turn, after a warm-up that does not count.

    Prompts never repeat, because an engine with a prefix cache would skip the prefill.
    """
    warm_up, *measured = prompts
    for worker in workers:
        worker.measure(warm_up, min(WARM_UP_TOKENS, options.new_tokens))
    return [
        [worker.measure(prompt, options.new_tokens) for worker in workers] for prompt in measured
    ]
