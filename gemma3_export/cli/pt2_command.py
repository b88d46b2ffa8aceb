"""Define the command ``gemma3-export pt2``."""

from __future__ import annotations

from functools import partial

import click

from gemma3_export.cli.export_options import ExportOptions, dtype_option, export_options, run_export

__all__ = ["pt2"]


EPILOG = """\b
Examples:
  gemma3-export pt2 --size 270m -o gemma-3-270m
  gemma3-export pt2 --weights model.gguf -o existing-onnx-bundle
"""


@click.command(epilog=EPILOG)
@export_options
@dtype_option(
    "pt2",
    "fp16: rejected if the residual stream approaches its maximum; use bf16 instead.",
)
def pt2(options: ExportOptions, dtypes: tuple[str, ...]) -> None:
    """Export with torch.export and prove parity with the model.

    torch.export is the successor of TorchScript; docs/torchscript.md compares both. The exported
    program needs only torch and runs on the CPU.
    """
    from gemma3_export.api.exporting import export_pt2

    run_export(options, "pt2", dtypes, " and ".join(dtypes), partial(export_pt2, dtype=dtypes))
