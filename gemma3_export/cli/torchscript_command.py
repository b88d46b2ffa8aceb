"""``gemma3-export torchscript``."""

from __future__ import annotations

from functools import partial

import click

from gemma3_export.cli.export_options import ExportOptions, export_options, run_export

__all__ = ["DTYPES", "torchscript"]

# Repeated from the exporter, which needs torch to be imported; a test holds them equal.
DTYPES = ("fp32", "bf16", "fp16")
EPILOG = """\b
Examples:
  gemma3-export torchscript --size 270m -o gemma-3-270m
  gemma3-export torchscript --weights model.gguf --dtype bf16 -o out
  gemma3-export torchscript --weights model.gguf -o existing-onnx-bundle
"""


@click.command(epilog=EPILOG)
@export_options
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="fp32",
    show_default=True,
    help="fp16: refused where the residual stream comes near its end; take bf16.",
)
@click.option(
    "--no-prepack",
    is_flag=True,
    help="Leave matrices as they are on loading, for torch builds without oneDNN.",
)
def torchscript(options: ExportOptions, dtype: str, no_prepack: bool) -> None:
    """Export Gemma 3 to a TorchScript archive and prove that it computes what the model computes.

    The archive needs torch or libtorch alone, in Python or C++. PyTorch has deprecated TorchScript;
    docs/torchscript.md says what that means. An archive is code: it is loaded only when its hash is
    the manifest's.
    """
    from gemma3_export.exporting import export_torchscript

    export = partial(export_torchscript, dtype=dtype, prepack=not no_prepack)
    run_export(options, "torchscript", dtype, export)
