"""Define the command ``gemma3-export doctor``."""

from __future__ import annotations

import json

import click

from gemma3_export.bundle import RUNTIMES
from gemma3_export.cli.styles import styled
from gemma3_export.errors import UnavailableError

__all__ = ["doctor"]

EPILOG = """\b
Examples:
  gemma3-export doctor
  gemma3-export doctor --device cuda:1 --json
  gemma3-export doctor --runtime torchscript
  gemma3-export doctor --device cpu

\b
Exit codes: 0 the device is usable, 2 bad usage, 3 the device is not usable.
"""


@click.command(epilog=EPILOG)
@click.option("--device", default="cuda", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="onnx",
    show_default=True,
    help="Runtime to test the device with; all except onnx use torch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def doctor(device: str, runtime: str, as_json: bool) -> None:
    """Check whether CUDA is usable; if not, say how to fix it.

    Shows Python, the installed packages, the NVIDIA driver and its GPUs, and the CUDA libraries
    that ONNX Runtime loads, then multiplies two matrices on the device. Each test runs in its own
    process, so the doctor also reports crashes.
    """
    from gemma3_export.cuda.doctor import examine
    from gemma3_export.cuda.terminal import doctor_lines

    report = examine(device, runtime)
    click.echo(
        json.dumps(report.to_json(), indent=1)
        if as_json
        else styled("\n".join(doctor_lines(report)))
    )
    if not report.is_usable:
        click.get_current_context().exit(UnavailableError.exit_code)
