"""Define the command ``gemma3-export inspect``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from gemma3_export.cli.options import PATH, note_variant
from gemma3_export.cli.styles import styled
from gemma3_export.errors import Gemma3ExportError

__all__ = ["inspect"]

EPILOG = """\b
Examples:
  gemma3-export inspect gemma-3-270m
  gemma3-export inspect gemma-3-270m --check
  gemma3-export inspect gemma-3-270m --json | python3 -m json.tool
  gemma3-export inspect gemma-3-270m --cuda-placement --cuda-python .venv-cuda/bin/python
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.option(
    "--variant",
    metavar="NAME",
    help="Which of several graphs to show, such as fp32, int8 or int4-fp16.  [default: all; with "
    "--cuda-placement, the one in model.onnx, otherwise the first]",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--check", is_flag=True, help="Verify the SHA-256 of every file.")
@click.option(
    "--cuda-placement",
    is_flag=True,
    help="Instead, check that the ONNX graph runs on an NVIDIA GPU from end to end. Needs no GPU.",
)
@click.option(
    "--cuda-python",
    type=PATH,
    help="Interpreter with onnxruntime-gpu, for --cuda-placement.  [default: this one]",
)
def inspect(
    bundle_path: Path,
    variant: str | None,
    as_json: bool,
    check: bool,
    cuda_placement: bool,
    cuda_python: Path | None,
) -> None:
    """Show a bundle's model, graphs, files and proof of parity.

    With --cuda-placement, show instead where ONNX Runtime places each node of the ONNX graph, using
    a stub of CUDA. The exit code is 1 if anything except shape computations stays on the CPU.
    """
    if cuda_python is not None and not cuda_placement:
        raise click.UsageError(
            "--cuda-python needs --cuda-placement; add it, or drop --cuda-python"
        )

    from gemma3_export.bundle import Bundle

    bundle = Bundle(bundle_path, variant)
    if check:
        bundle.check_files()
    else:
        bundle.check_quickly()
    if cuda_placement:
        from gemma3_export.cuda.placement import check_placement
        from gemma3_export.cuda.terminal import placement_lines

        report = check_placement(bundle, cuda_python)
        note_variant(bundle, bundle.graph("onnx").variant)
        show(report.to_json(), placement_lines(report), as_json=as_json)
        if not report.passed:
            click.get_current_context().exit(Gemma3ExportError.exit_code)
        return

    from gemma3_export.bundle.inspection import inspect_bundle
    from gemma3_export.bundle.terminal import bundle_lines

    facts = inspect_bundle(bundle) | {"files_checked": "sha256" if check else "sample"}
    show(facts, bundle_lines(facts), as_json=as_json)


def show(facts: dict[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print one JSON object, or lines for people."""
    click.echo(json.dumps(facts, indent=1) if as_json else styled("\n".join(lines)))
