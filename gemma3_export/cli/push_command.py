"""Define the command ``gemma3-export push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_export.cli.options import PATH, hf_token_option
from gemma3_export.progress import ProgressBars

if TYPE_CHECKING:
    from gemma3_export.api.publishing import PushResult

__all__ = ["push"]

EPILOG = """\b
Examples:
  gemma3-export push gemma-3-270m me/gemma-3-270m-onnx --dry-run
  gemma3-export push gemma-3-270m me/gemma-3-270m-onnx --private
  gemma3-export push gemma-3-270m me/gemma-3-270m-onnx --revision int8
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Branch to push to; it is created if it is missing.  [default: main]",
)
@click.option("--commit-message", metavar="TEXT", help="Message of the commit.")
@hf_token_option
@click.option(
    "--allow-unproven", is_flag=True, help="Accept a bundle that was exported with --no-verify."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the bundle and list what would be uploaded, without using the network.",
)
def push(
    bundle_path: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    commit_message: str | None,
    hf_token: str | None,
    allow_unproven: bool,
    dry_run: bool,
) -> None:
    """Upload a bundle to the Hugging Face Hub.

    Every file is checked before the upload and after it. The model card, README.md, is written
    for the repository, unless you edited it. To resume an interrupted upload, run the same command
    again.
    """
    from gemma3_export.api.publishing import PushOptions, push_to_hub

    if not sys.stderr.isatty():
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            disable_progress_bars,
        )

        disable_progress_bars()
    with ProgressBars() as progress:
        options = PushOptions(
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=hf_token,
            allow_unproven=allow_unproven,
            dry_run=dry_run,
            progress=progress,
        )
        result = push_to_hub(bundle_path, repo_id, options)
    _print_summary(bundle_path, result)


def _print_summary(path: Path, result: PushResult) -> None:
    if result.url is None:
        for name, size in result.files.items():
            click.echo(f"{size:>15,}  {name}")
    total = f"{len(result.files)} files, {result.size_bytes / 1e6:,.1f} MB"
    if result.left_out:
        click.echo(f"not part of the bundle, left out: {', '.join(result.left_out)}")
    if result.deleted:
        click.echo(f"of an earlier bundle, deleted: {', '.join(result.deleted)}")
    if result.kept:
        click.echo(f"edited on the Hub, kept as it is there: {', '.join(result.kept)}")
    if result.is_card_edited:
        click.echo(f"card: {path / 'README.md'}, as you edited it")
    elif "README.md" not in result.kept:
        click.echo(f"card: {path / 'README.md'}, written for {result.repo_id}")
        if result.license is None:
            click.echo(
                "the license of the weights is unknown, so the card names none; add "
                f"`license: ...` to the first lines of {path / 'README.md'}"
            )
    if result.url is None:
        click.echo(f"would upload {total} to {result.repo_id}; nothing was changed (--dry-run)")
    else:
        click.echo(f"{result.url}: {total}, checked against the manifest")
