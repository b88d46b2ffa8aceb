"""``python -m benchmarks.peers``: make peers' environments and their models."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from benchmarks.peers import DEFAULT_PLACE, PEERS
from gemma3_export.errors import Gemma3ExportError

__all__ = ["main"]

NAMES = "; ".join(f"{peer.name}: {', '.join(peer.formats)}" for peer in PEERS.values())


@click.command(
    epilog=f"Formats, the first of each by default: {NAMES}.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("specs", nargs=-1, required=True, metavar="NAME[:FORMAT]...")
@click.option("--weights", metavar="SRC", required=True, help="What `gemma3-export onnx` takes.")
@click.option(
    "--peers",
    "place",
    type=click.Path(path_type=Path),
    default=DEFAULT_PLACE,
    show_default=True,
    help="Where environments and models go.",
)
@click.option("--pip-args", default="", help="More arguments for pip, such as an index.")
@click.option("--force", is_flag=True, help="Make models again that are there.")
def main(specs: tuple[str, ...], weights: str, place: Path, pip_args: str, force: bool) -> None:
    """Install other engines, each in an environment of its own, and give them the same weights.

    Versions are exact. One is installed after the other; what is there already is kept.
    """
    from benchmarks.peers.environments import set_up

    try:
        set_up(specs, weights, place, pip_arguments=pip_args.split(), force=force, tell=click.echo)
    except Gemma3ExportError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
