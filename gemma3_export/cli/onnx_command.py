"""``gemma3-export onnx``."""

from __future__ import annotations

from functools import partial

import click

from gemma3_export.cli.export_options import ExportOptions, export_options, run_export

__all__ = ["DTYPES", "TARGETS", "onnx"]

# Repeated from the exporters, which need torch to be imported; a test holds them equal.
TARGETS = ("ort", "portable")
DTYPES = ("fp32", "bf16", "fp16")
EPILOG = """\b
Examples:
  gemma3-export onnx --size 270m -o gemma-3-270m
  gemma3-export onnx --weights model.gguf --target portable -o out
  gemma3-export onnx --weights checkpoint.pt --config config.json --tokenizer tokenizer.json -o out
  gemma3-export onnx --size 1b --random-weights 0 -o random-1b
"""


@click.command(epilog=EPILOG)
@export_options
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="ort",
    show_default=True,
    help="ort: ONNX Runtime's fused kernels. portable: standard operators only.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True)
def onnx(options: ExportOptions, target: str, dtype: str) -> None:
    """Export Gemma 3 to ONNX and prove that the result computes what the model computes.

    The output is one folder that stands alone: graph, weights, config, tokenizer, a manifest with
    the hash of every file, and the parity report. It appears when all of it is there; an export
    that fails or is interrupted leaves nothing behind. --size alone takes the official weights from
    the Hub.
    """
    from gemma3_export.exporting import export_onnx

    export = partial(export_onnx, target=target, dtype=dtype)
    run_export(options, "onnx", f"{dtype}, target {target}", export)
