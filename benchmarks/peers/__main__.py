"""``python -m benchmarks.peers``: create the environments and models of other engines."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gemma3_export.bench.peers import DEFAULT_FOLDER, ENGINES
from gemma3_export.errors import Gemma3ExportError

__all__ = ["main"]

NAMES = "; ".join(f"{name}: {', '.join(formats)}" for name, formats in ENGINES.items())


@click.command(
    epilog=f"Formats, the default first: {NAMES}.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("specs", nargs=-1, required=True, metavar="NAME[:FORMAT]...")
@click.option(
    "--weights", metavar="SRC", required=True, help="Anything that `gemma3-export onnx` accepts."
)
@click.option(
    "--peers",
    "folder",
    type=click.Path(path_type=Path),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="Folder for environments and models.",
)
@click.option("--pip-args", default="", help="More arguments for pip, such as an index.")
@click.option("--force", is_flag=True, help="Convert again models that already exist.")
def main(specs: tuple[str, ...], weights: str, folder: Path, pip_args: str, force: bool) -> None:
    """Install other engines, each in its own environment, and convert the weights for each.

    All versions are pinned. Environments and models that already exist are kept.
    """
    from benchmarks.peers.environments import set_up

    try:
        set_up(specs, weights, folder, pip_arguments=pip_args.split(), force=force, echo=click.echo)
    except Gemma3ExportError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
