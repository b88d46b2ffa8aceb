"""``gemma3-export doctor``."""

from __future__ import annotations

import json

import click

from gemma3_export.bundle.bundle import RUNTIMES

__all__ = ["doctor"]

NOT_USABLE = 3
EPILOG = """\b
Examples:
  gemma3-export doctor
  gemma3-export doctor --device cuda:1 --json
  gemma3-export doctor --runtime torchscript
  gemma3-export doctor --device cpu

\b
Exit codes: 0 the device computes, 2 bad usage, 3 it could not be used.
"""


@click.command(epilog=EPILOG)
@click.option("--device", default="cuda", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="onnx",
    show_default=True,
    help="All but onnx are torch's.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def doctor(device: str, runtime: str, as_json: bool) -> None:
    """Say whether CUDA can be used here, and if not, why and which command changes that.

    Shows Python, packages, the NVIDIA driver and its GPUs, and the CUDA libraries that ONNX Runtime
    loads; then two matrices are multiplied on the device. Everything is tried in processes of its
    own, so that what crashes there is reported too.
    """
    from gemma3_export.cli.doctor_lines import doctor_lines
    from gemma3_export.cuda.doctor import examine

    report = examine(device, runtime)
    click.echo(
        json.dumps(report.to_json(), indent=1) if as_json else "\n".join(doctor_lines(report))
    )
    if not report.is_usable:
        click.get_current_context().exit(NOT_USABLE)
