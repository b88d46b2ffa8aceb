"""Print where decode steps spend their time on a GPU: one table, in less than five minutes.

    python -m benchmarks.gpu_steps demo/gemma-3-270m-bf16
    python -m benchmarks.gpu_steps DIR --runtime torchscript --batch 1 --batch 8
    make bench-cuda-short                       the real 270M in bf16

Only bundles that exist are measured; nothing is exported meanwhile. Steps are those of the
generation loop: greedy, with candidates instead of logits. GPU time and kernels come from torch's
profiler, which sees every kernel of the process, ONNX Runtime's and those of CUDA graphs included.
The limit is the time to read all weights once at the bandwidth that is measured first. Without a
GPU (``--device cpu``) the columns of the GPU are empty.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gemma3_export.api.opening import open_runtime
from gemma3_export.bench.run import bandwidths_of
from gemma3_export.bench.worker import weight_bytes
from gemma3_export.bundle import Bundle
from gemma3_export.device import CudaOptions
from gemma3_export.runtimes.generation.candidates import SelectsCandidates
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import KVCache, Runtime

GREEDY = SamplingParams()
WARM_UPS = 8  # steps; the first two of them capture a CUDA graph
TIMED = 100
PROFILED = 10
NOT_KERNELS = ("Memcpy", "Memset")
HEADER = ("batch", "graph", "tok/s", "step ms", "GPU ms", "kernels", "of limit", "prefill ms")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """What one decode step takes; None if it was not measured on a GPU."""

    prefill_ms: float  # of one row, the second time
    step_ms: float  # median, as the host sees it
    gpu_ms: float | None
    kernels: float | None


def decode(runtime: Runtime, cache: KVCache, rows: int, steps: int) -> list[float]:
    """Decode ``steps`` tokens per row as the generation loop does; return each step's seconds."""
    ids, requests = np.full((rows, 1), runtime.config.bos_token_id), [GREEDY] * rows
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        found = None
        if isinstance(runtime, SelectsCandidates) and runtime.selects_candidates:
            found = runtime.step_candidates(ids, cache, requests)
        if found is None:
            runtime.step(ids, cache, num_logits=1)
        seconds.append(time.perf_counter() - started)
    return seconds


def on_the_gpu(events: Iterable[Any], steps: int) -> tuple[float, float]:
    """Return milliseconds and kernels per step; the time includes copies, the number does not."""
    found = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = sum(not event.name.startswith(NOT_KERNELS) for event in found)
    return sum(event.device_time for event in found) / 1000 / steps, kernels / steps


def measure(runtime: Runtime, rows: int, prompt_tokens: int) -> StepTimes:
    """Prefill every row, and time and profile decode steps of all of them."""
    prompt = np.random.default_rng(0).integers(0, runtime.config.vocab_size, (1, prompt_tokens))
    cache = runtime.new_cache(rows, prompt_tokens + WARM_UPS + TIMED + PROFILED)
    prefill_s = 0.0
    for row in range(rows):
        for _ in range(2 if row == 0 else 1):
            cache.truncate(row, 0)
            started = time.perf_counter()
            runtime.step(prompt, cache, num_logits=1, row=row)
            prefill_s = time.perf_counter() - started if row == 0 else prefill_s
    decode(runtime, cache, rows, WARM_UPS)
    step_ms = float(np.median(decode(runtime, cache, rows, TIMED))) * 1000
    gpu_ms = kernels = None
    if runtime.info.device.kind == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            decode(runtime, cache, rows, PROFILED)  # the candidates' copy waits for the GPU
        gpu_ms, kernels = on_the_gpu(profiled.events(), PROFILED)
    return StepTimes(prefill_ms=prefill_s * 1000, step_ms=step_ms, gpu_ms=gpu_ms, kernels=kernels)


def row_of(times: StepTimes, rows: int, graph: str, limit_ms: float | None) -> tuple[str, ...]:
    """Return one line of the table; the share is that of the GPU's time, or of the step's."""
    spent = times.gpu_ms or times.step_ms
    return (
        str(rows),
        graph,
        f"{rows * 1000 / times.step_ms:,.0f}",
        f"{times.step_ms:.3f}",
        "" if times.gpu_ms is None else f"{times.gpu_ms:.3f}",
        "" if times.kernels is None else f"{times.kernels:.0f}",
        "" if limit_ms is None else f"{limit_ms / spent:.0%}",
        f"{times.prefill_ms:.1f}",
    )


def table(lines: Sequence[Sequence[str]]) -> str:
    """Align columns to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--runtime", "name", default="onnx", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), default=(1, 8))
@click.option("--prompt-tokens", type=click.IntRange(1, 512), default=512, show_default=True)
def main(
    bundles: tuple[Path, ...], name: str, device: str, batches: tuple[int, ...], prompt_tokens: int
) -> None:
    """Measure decode steps of BUNDLES with and without a CUDA graph."""
    bandwidths, missing = bandwidths_of(device, 1)
    bandwidth = float(np.median(bandwidths)) if bandwidths else None
    shown = f"unknown: {missing}" if bandwidth is None else f"{bandwidth / 1e9:,.0f} GB/s"
    click.echo(f"{device} reads memory at {shown}; prompts of {prompt_tokens} tokens")
    graphs = (True, False) if device.startswith("cuda") else (False,)
    for path in bundles:
        bundle = Bundle(path)
        lines: list[tuple[str, ...]] = [HEADER]
        for graph in graphs:
            cuda = CudaOptions(graph=graph) if device.startswith("cuda") else None
            runtime = open_runtime(bundle, name, device=device, threads=1, cuda=cuda)
            size = weight_bytes(bundle, runtime.info)
            limit_ms = None if bandwidth is None else size / bandwidth * 1000
            for rows in batches:
                times = measure(runtime, rows, prompt_tokens)
                lines.append(row_of(times, rows, "yes" if graph else "no", limit_ms))
            del runtime
        click.echo(f"\n{path}, {name}\n{table(lines)}")


if __name__ == "__main__":
    main()
