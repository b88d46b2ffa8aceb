"""Share options, spreads and reports between the benchmark scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gemma3_export.bench.report import scaled, spread
from gemma3_export.bundle import RUNTIMES
from gemma3_export.cli.options import threads_option
from gemma3_export.staging import write_text_atomically

__all__ = [
    "bundle_argument",
    "report_option",
    "rounds_option",
    "runtime_option",
    "show_spread",
    "threads_option",
    "write_report",
]

bundle_argument = click.argument("bundle_path", metavar="DIR", type=click.Path(path_type=Path))
runtime_option = click.option(
    "--runtime", type=click.Choice(RUNTIMES), default="onnx", show_default=True
)
rounds_option = click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="Measured rounds.",
)


def _with_folder(context: click.Context, parameter: click.Parameter, path: Path | None) -> Any:
    """Check before anything is measured that the folder of a report exists."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}; create it first")
    return path


report_option = click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_with_folder,
    help="Write all measurements to a JSON file.",
)


def show_spread(values: Sequence[float], digits: int) -> str:
    """Format the median and the range of ``values``."""
    return scaled(spread(values), 1, digits)


def write_report(path: Path | None, found: Mapping[str, Any]) -> None:
    """Write ``found`` as JSON, if the user asked for a file."""
    if path is not None:
        write_text_atomically(path, json.dumps(found, indent=1) + "\n")
