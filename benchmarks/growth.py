"""Measure how cost grows: decode time with context length, and export memory with model size.

    python -m benchmarks.growth decode DIR --threads 2 --report build/decode.json
    python -m benchmarks.growth export --size 270m --size 1b --size 4b --report build/export.json
    python -m benchmarks.growth plot build/decode.json build/export.json -o docs/growth.png

`decode` fills caches with random numbers instead of a long prefill; windowed and full caches take
turns. `export` writes int8 bundles of random weights, one process each, and removes them. `plot`
needs matplotlib.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from benchmarks.common import (
    bundle_argument,
    report_option,
    rounds_option,
    threads_option,
    write_report,
)
from gemma3_export.bundle import Bundle
from gemma3_export.config import preset
from gemma3_export.runtimes.onnx.caches import InPlaceCache
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime

LENGTHS = (16, 512, 1024, 2048, 4096, 8192, 16384, 32000)
STEPS = 8  # decode steps per turn
KINDS = ("windowed", "full")


@click.group()
def main() -> None:
    """Measure how cost grows, and plot it."""


def filled_cache(runtime: OnnxRuntime, length: int, capacity: int) -> InPlaceCache:
    """Return a cache with one row of ``length`` random tokens."""
    cache = runtime.new_cache(1, capacity)
    assert isinstance(cache, InPlaceCache)
    generator = np.random.default_rng(length)
    for array in cache.arrays:
        array[:] = generator.standard_normal(array.shape, np.float32) * 0.1
    cache.lengths[0] = length
    return cache


def decode_ms(runtime: OnnxRuntime, cache: InPlaceCache, length: int) -> float:
    """Return the median milliseconds of a decode step after ``length`` tokens."""
    times = []
    cache.lengths[0] = length
    for token in range(STEPS):
        started = time.perf_counter()
        runtime.step(np.array([[token + 5]]), cache, num_logits=1)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


@main.command()
@bundle_argument
@threads_option
@rounds_option
@report_option
def decode(bundle_path: Path, threads: int | None, rounds: int, report: Path | None) -> None:
    """Measure decode time against context length."""
    limit = Bundle(bundle_path).config.max_position_embeddings
    lengths = [length for length in LENGTHS if length + STEPS <= limit]
    times: dict[tuple[str, int], list[float]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for _ in range(rounds):
        for kind in KINDS:  # one at a time: with two in memory, the second runs faster
            runtime = OnnxRuntime(
                bundle_path, device="cpu", threads=threads, sliding_window_cache=kind == "windowed"
            )
            for length in lengths:
                cache = filled_cache(runtime, length, length + STEPS)
                decode_ms(runtime, cache, length)  # warm-up
                times.setdefault((kind, length), []).append(decode_ms(runtime, cache, length))
                sizes[kind, length] = sum(array.nbytes for array in cache.arrays)
            del runtime, cache
    found = []
    for length in lengths:
        row: dict[str, float] = {"tokens": length}
        for kind in KINDS:
            row[f"{kind}_ms"] = statistics.median(times[kind, length])
            row[f"{kind}_bytes"] = sizes[kind, length]
        row["ratio"] = row["full_ms"] / row["windowed_ms"]
        found.append(row)
        click.echo(
            f"{length:6d} tokens: windowed {row['windowed_ms']:6.1f} ms, full "
            f"{row['full_ms']:6.1f} ms, {row['ratio']:.2f} x; cache "
            f"{row['windowed_bytes'] / 1e6:.0f} and {row['full_bytes'] / 1e6:.0f} MB"
        )
    write_report(report, {"decode": found})


@main.command()
@click.option("--size", "sizes", multiple=True, default=("270m", "1b", "4b"), show_default=True)
@click.option("--dtype", default="int8", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for temporary bundles.")
@report_option
def export(sizes: tuple[str, ...], dtype: str, folder: Path | None, report: Path | None) -> None:
    """Measure the peak memory of an export against model size."""
    found = []
    for size in sizes:
        config = preset(size).config
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [
                *(sys.executable, "-m", "gemma3_export", "onnx", "--size", size),
                *("--random-weights", "0", "--dtype", dtype, "--no-verify"),
                *("-o", f"{temporary}/bundle"),
            ]
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            files = Path(temporary).rglob("*.onnx*")
            stored = sum(file.stat().st_size for file in files)
        # the maximum over all children so far, so sizes must grow
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        row = {
            "size": size,
            "parameters": config.num_parameters,
            "largest_tensor_bytes": max(
                4 * math.prod(shape) for _, shape in config.weight_shapes()
            ),
            "peak_bytes": peak,
            "stored_bytes": stored,
            "seconds": seconds,
        }
        found.append(row)
        click.echo(
            f"{size}: peak {peak / 1e9:.2f} GB, wrote {stored / 1e9:.2f} GB in {seconds:.0f} s"
        )
    write_report(report, {"export": found, "dtype": dtype})


@main.command()
@click.argument("decode_report", type=click.Path(path_type=Path))
@click.argument("export_report", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default="docs/growth.png")
def plot(decode_report: Path, export_report: Path, output: Path) -> None:
    """Plot both reports."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    rows = json.loads(decode_report.read_text(encoding="utf-8"))["decode"]
    for kind in KINDS:
        lengths = [row["tokens"] for row in rows]
        left.plot(lengths, [row[f"{kind}_ms"] for row in rows], marker="o", label=f"{kind} caches")
    left.set(xlabel="context length, tokens", ylabel="ms per token", title="Decoding", xscale="log")
    rows = json.loads(export_report.read_text(encoding="utf-8"))["export"]
    billions = [row["parameters"] / 1e9 for row in rows]
    for key, label in (
        ("stored_bytes", "written"),
        ("peak_bytes", "peak memory"),
        ("largest_tensor_bytes", "largest tensor in float32"),
    ):
        right.plot(billions, [row[key] / 1e9 for row in rows], marker="o", label=label)
    right.set(xlabel="parameters, 1e9", ylabel="GB", title="Export")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
