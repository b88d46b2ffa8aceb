"""``gemma3-export torchscript``."""

from __future__ import annotations

from functools import partial

import click

from gemma3_export.cli.options import ExportOptions, export_options, refuse_if_given, run_export
from gemma3_export.dtypes import dtype_choices

__all__ = ["torchscript"]

# Repeated from the exporter, which needs torch to be imported; a test holds them equal.
EPILOG = """\b
Examples:
  gemma3-export torchscript --size 270m -o gemma-3-270m
  gemma3-export torchscript --weights model.gguf --dtype bf16 -o out
  gemma3-export torchscript --size 270m --dtype int8 -o gemma-3-270m-int8
  gemma3-export torchscript --weights model.gguf -o existing-onnx-bundle
"""


@click.command(epilog=EPILOG)
@export_options
@click.option(
    "--dtype",
    type=click.Choice(dtype_choices("torchscript")),
    default="fp32",
    show_default=True,
    help="fp16: refused where the residual stream comes near its end; take bf16. "
    "int8: matrices in 8-bit blocks, computing in bf16.",
)
@click.option(
    "--block-size",
    type=click.Choice(("16", "32", "64", "128", "256")),
    default="128",
    show_default=True,
    help="int8: inputs of a matrix that share a scale.",
)
@click.option(
    "--max-kld",
    type=click.FloatRange(min=0, min_open=True),
    help="Divergence from full precision at which the export fails, nats a token; the limits of "
    "greedy agreement and perplexity follow from it [default: 0.01].",
)
@click.option(
    "--no-prepack",
    is_flag=True,
    help="Leave matrices as they are on loading, for torch builds without oneDNN.",
)
def torchscript(
    options: ExportOptions, dtype: str, block_size: str, max_kld: float | None, no_prepack: bool
) -> None:
    """Export Gemma 3 to a TorchScript archive and prove that it computes what the model computes.

    The archive needs torch or libtorch alone, in Python or C++. PyTorch has deprecated TorchScript;
    docs/torchscript.md says what that means. An archive is code: it is loaded only when its hash is
    the manifest's.
    """
    if dtype != "int8":
        refuse_if_given("block_size", "--block-size", f"it is for --dtype int8, not for {dtype}")
    from gemma3_export.api.exporting import export_torchscript

    export = partial(
        export_torchscript,
        dtype=dtype,
        prepack=not no_prepack,
        block_size=int(block_size),
        max_kld=max_kld,
    )
    run_export(options, "torchscript", dtype, export)
