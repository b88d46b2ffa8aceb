"""``gemma3-export bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.peers import DEFAULT_PLACE
from gemma3_export.bundle import RUNTIMES
from gemma3_export.cli.options import CudaRequest, cuda_options

__all__ = ["bench"]

EPILOG = """\b
Examples:
  gemma3-export bench gemma-3-270m
  gemma3-export bench gemma-3-270m --threads 2 --against transformers
  gemma3-export bench gemma-3-270m --prompt-tokens 16 --prompt-tokens 2048 --batch 1 --batch 8
  gemma3-export bench gemma-3-270m --against llama.cpp:Q8_0 --against openvino:int8
  gemma3-export bench gemma-3-270m --against llama.cpp --weights model.gguf --plot speeds.svg
  gemma3-export bench gemma-3-270m-bf16 --device cuda --cuda-graph --against transformers:static

\b
Peers: transformers, transformers:static (static cache, compiled decode steps), reference (the
PyTorch model); and once `python -m benchmarks.peers` has installed them: optimum-onnx,
onnxruntime-genai, onnxruntime-genai-cuda, llama.cpp, openvino, with :FORMAT for another than the
default.
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    multiple=True,
    default=(512,),
    show_default=True,
    metavar="N",
    help="Several are measured one after the other.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens decoded after each prompt.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1,),
    show_default=True,
    metavar="N",
    help="Several are measured with every prompt length.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="By default all processors."
)
@click.option("--runtime", type=click.Choice(RUNTIMES), default="onnx", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@cuda_options
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Measurements of each candidate.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="NAME[:FORMAT]",
    help="A peer that is measured in turns with the bundle; several times for several.",
)
@click.option(
    "--peers",
    type=click.Path(path_type=Path),
    default=DEFAULT_PLACE,
    show_default=True,
    help="Where `python -m benchmarks.peers` put them.",
)
@click.option(
    "--weights",
    metavar="SRC",
    help="Full-precision weights: adds how far each candidate's logits lie from them.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the same into a file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the speeds as an SVG image.")
def bench(
    bundle_path: Path,
    cuda: CudaRequest,
    as_json: bool,
    report: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure load time, prefill, decode and memory, each candidate in its own process.

    With --against the candidates take turns on the same prompts, and the ratios of each round are
    printed: above 1 the bundle is better. "of limit" is the share of the memory's reading speed,
    measured in the same run, that decoding one token's weights uses.
    """
    from gemma3_export.bench.report import table_lines
    from gemma3_export.bench.run import BenchmarkOptions, run_benchmark
    from gemma3_export.staging import write_text_atomically

    options["device"], options["cuda"] = cuda.settle(options["device"], options["runtime"])
    found = run_benchmark(bundle_path, BenchmarkOptions(**options))
    text = json.dumps(found, indent=1)
    if report is not None:
        write_text_atomically(report, text + "\n")
    if plot is not None:
        from gemma3_export.bench.report import speed_plot

        write_text_atomically(plot, speed_plot(found))
    click.echo(text if as_json else "\n".join(table_lines(found)))
