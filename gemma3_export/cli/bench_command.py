"""Define the command ``gemma3-export bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gemma3_export.bench.peers import BUILT_IN_PEERS, DEFAULT_FOLDER, ENGINES
from gemma3_export.bundle import RUNTIMES, Bundle
from gemma3_export.cli.options import (
    PATH,
    THREADS,
    CudaRequest,
    cuda_options,
    integer,
    note_variant,
    variant_option,
)
from gemma3_export.cli.styles import styled

__all__ = ["bench"]

EPILOG = f"""\b
Examples:
  gemma3-export bench gemma-3-270m
  gemma3-export bench gemma-3-270m --threads 2 --against transformers
  gemma3-export bench gemma-3-270m --prompt-tokens 16 --prompt-tokens 2048 --batch 1 --batch 8
  gemma3-export bench gemma-3-270m --against llama.cpp:Q8_0 --against openvino:int8
  gemma3-export bench gemma-3-270m --against llama.cpp --weights model.gguf --plot speeds.svg
  gemma3-export bench gemma-3-270m-bf16 --device cuda --against transformers:static

\b
Peers:
  {", ".join(BUILT_IN_PEERS)}
  {", ".join(ENGINES)}

"transformers:static" has a static cache and compiled decode steps; "reference" is the PyTorch
model. The second line lists engines with their own environments; set them up from a checkout with
`python -m benchmarks.peers NAME[:FORMAT] --weights SRC`.
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.option(
    "--prompt-tokens",
    type=integer(),
    multiple=True,
    default=(512,),
    show_default=True,
    metavar="N",
    help="Prompt length. Repeat the option to measure several.",
)
@click.option(
    "--new-tokens",
    type=integer(),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens to decode after each prompt.",
)
@click.option(
    "--batch",
    type=integer(),
    multiple=True,
    default=(1,),
    show_default=True,
    metavar="N",
    help="Batch size. Repeat the option to measure several with every prompt length.",
)
@click.option(
    "--threads",
    type=THREADS,
    metavar="N",
    help="Intra-op threads.  [default: all cores that this process may use]",
)
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="onnx",
    show_default=True,
    help="Which of the bundle's exports to run.",
)
@variant_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@cuda_options
@click.option(
    "--huge-pages/--no-huge-pages",
    default=True,
    show_default=True,
    help="Keep the bundle's weights in huge pages on the CPU, as `serve` does (Linux).",
)
@click.option(
    "--repeat",
    type=integer(),
    default=3,
    show_default=True,
    metavar="N",
    help="Measured rounds per case.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="NAME[:FORMAT]",
    help="Take turns with this peer. Repeat the option for several peers.",
)
@click.option(
    "--peers",
    type=PATH,
    default=DEFAULT_FOLDER,
    show_default=True,
    help="Folder of the peers that `python -m benchmarks.peers` has set up.",
)
@click.option(
    "--weights",
    metavar="SRC",
    help="Full-precision weights. Adds each candidate's divergence from them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--report", type=PATH, help="Also write that JSON object to a file.")
@click.option("--plot", type=PATH, help="Plot the speeds as an SVG image.")
def bench(
    bundle_path: Path,
    cuda: CudaRequest,
    as_json: bool,
    report: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure load time, prefill, decode and memory.

    Each candidate runs in its own process. With --against, the candidates take turns on the same
    prompts. Ratios are computed within each round; above 1, the bundle is better. The column "of
    limit" is the share of the machine's memory bandwidth, measured in the same run, that decoding
    uses to read the weights.
    """
    from gemma3_export.bench.report import table_lines
    from gemma3_export.bench.run import BenchmarkOptions, run_benchmark
    from gemma3_export.staging import check_writable, write_text_atomically

    for file in (report, plot):
        if file is not None:
            check_writable(file)
    options["device"], options["cuda"] = cuda.settle(options["device"], options["runtime"])
    found = run_benchmark(bundle_path, BenchmarkOptions(**options))
    note_variant(Bundle(bundle_path, options["variant"]), found["options"]["variant"])
    text = json.dumps(found, indent=1)
    if report is not None:
        write_text_atomically(report, text + "\n")
    if plot is not None:
        from gemma3_export.bench.report import speed_plot

        write_text_atomically(plot, speed_plot(found))
    click.echo(text if as_json else styled("\n".join(table_lines(found))))
