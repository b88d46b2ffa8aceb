"""Define the command ``gemma3-export torchscript``."""

from __future__ import annotations

from functools import partial

import click

from gemma3_export.cli.export_options import ExportOptions, dtype_option, export_options, run_export
from gemma3_export.cli.options import BUDGET, reject_if_given

__all__ = ["torchscript"]

EPILOG = """\b
Examples:
  gemma3-export torchscript --size 270m -o gemma-3-270m
  gemma3-export torchscript --weights model.gguf --dtype bf16 -o out
  gemma3-export torchscript --size 270m --dtype int8 -o gemma-3-270m-int8
  gemma3-export torchscript --weights model.gguf -o existing-onnx-bundle
"""


@click.command(epilog=EPILOG)
@export_options
@dtype_option(
    "torchscript",
    "fp16: rejected if the residual stream approaches its maximum; use bf16 instead. "
    "int8: weights in 8-bit blocks, computed in bf16.",
)
@click.option(
    "--block-size",
    type=click.Choice(("16", "32", "64", "128", "256")),
    default="128",
    show_default=True,
    help="Input features that share one scale, for int8.",
)
@click.option(
    "--max-kld",
    type=BUDGET,
    help="Fail if the mean KL divergence from full precision exceeds this many nats per token. "
    "The limits for greedy agreement and perplexity are derived from it.  [default: 0.01]",
)
@click.option(
    "--no-prepack",
    is_flag=True,
    help="Do not repack matrices at load time, for torch builds without oneDNN.",
)
def torchscript(
    options: ExportOptions,
    dtypes: tuple[str, ...],
    block_size: str,
    max_kld: float | None,
    no_prepack: bool,
) -> None:
    """Export to TorchScript and prove parity with the model.

    The archive needs only torch (Python) or libtorch (C++). PyTorch has deprecated TorchScript;
    docs/torchscript.md explains the consequences. A TorchScript archive is executable code, so it
    is loaded only if its hash matches the manifest.
    """
    names = " and ".join(dtypes)
    if "int8" not in dtypes:
        reject_if_given("block_size", "--block-size", f"it applies to --dtype int8, not to {names}")
    from gemma3_export.api.exporting import export_torchscript

    export = partial(
        export_torchscript,
        dtype=dtypes,
        prepack=not no_prepack,
        block_size=int(block_size),
        max_kld=max_kld,
    )
    run_export(options, "torchscript", dtypes, names, export)
