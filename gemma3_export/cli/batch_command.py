"""Define the command ``gemma3-export batch``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import click

from gemma3_export.cli.generation_options import (
    OpeningRequest,
    note_unused_seed,
    note_variant_of,
    opening_options,
    sampling_options,
)
from gemma3_export.cli.options import PATH, TEXT_PATH, WHOLE, integer
from gemma3_export.progress import ProgressBars

__all__ = ["batch"]

EPILOG = """\b
Examples:
  gemma3-export batch gemma-3-270m-it questions.jsonl answers.jsonl
  gemma3-export batch gemma-3-270m texts.jsonl out.jsonl --max-new-tokens 32 --batch-size 16
  gemma3-export batch DIR in.csv out.parquet --column question --chat
  gemma3-export batch DIR in.jsonl out.jsonl --chat --system "Be brief." --on-error record
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.argument("source", metavar="IN", type=TEXT_PATH)
@click.argument("target", metavar="OUT", type=TEXT_PATH)
@click.option(
    "--column",
    metavar="NAME",
    help="Column of the prompt: messages, prompt, or one with text.  "
    "[default: the one of messages, prompt and text that a row has]",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Treat each prompt that is a text as a user message, in the bundle's chat template.",
)
@click.option("--system", metavar="TEXT", help="System message before those (requires --chat).")
@click.option(
    "--tools",
    "tools_path",
    type=TEXT_PATH,
    metavar="FILE",
    help="JSON list of schemas of functions that the model may call, for conversations without "
    "tools of their own.",
)
@click.option(
    "--chat-template", metavar="NAME", help="Which of the bundle's chat templates to use."
)
@click.option(
    "--literal/--no-literal",
    default=True,
    show_default=True,
    help="Treat control tokens that a text spells as plain text.",
)
@sampling_options
@click.option(
    "--logprobs",
    type=WHOLE,
    metavar="N",
    help="Report the N most likely tokens at each position.",
)
@click.option(
    "--batch-size",
    type=integer(),
    default=8,
    show_default=True,
    metavar="N",
    help="How many rows to generate at once.",
)
@click.option(
    "--on-error",
    type=click.Choice(("stop", "record")),
    default="stop",
    show_default=True,
    help="A row that is malformed or too long: stop before generating anything, or record an "
    "object with the error in its place.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--restart", is_flag=True, help="Discard the rows that an interrupted run has finished."
)
@opening_options
def batch(
    bundle_path: Path,
    source: Path,
    target: Path,
    column: str | None,
    chat: bool,
    system: str | None,
    tools_path: Path | None,
    chat_template: str | None,
    literal: bool,
    batch_size: int,
    on_error: Literal["stop", "record"],
    force: bool,
    restart: bool,
    opening: OpeningRequest,
    **sampling: Any,
) -> None:
    """Generate for every row of a JSONL, CSV or Parquet file.

    Greedy unless a temperature or a filter is given. A row has messages, prompt (a text, or
    messages) or text, and may have tools and an id. One result per row goes to OUT, in the order of
    the input, once all are finished. Files that end in .csv or .parquet have that format, and
    others are JSONL. The longest rows run first. After an interruption, the same command
    continues with the rows that are not finished.
    """
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")

    from gemma3_export.api.batch import BatchOptions, run_batch
    from gemma3_export.api.options import GenerateOptions
    from gemma3_export.cli.prompts import read_tools

    options = GenerateOptions(
        allow_control_tokens=not literal,
        tools=None if tools_path is None else read_tools(tools_path),
        chat_template=chat_template,
        **sampling,
    )
    model = opening.open(bundle_path)
    note_unused_seed(options.seed, is_greedy=options.is_greedy)
    note_variant_of(model)
    started = time.perf_counter()
    try:
        with ProgressBars() as progress:
            summary = run_batch(
                model,
                source,
                target,
                options,
                BatchOptions(
                    batch_size=batch_size,
                    column=column,
                    chat=chat,
                    system=system,
                    on_error=on_error,
                    force=force,
                    restart=restart,
                ),
                progress=progress,
            )
    except KeyboardInterrupt:
        click.echo("finished rows are kept; run the same command again to continue", err=True)
        raise
    seconds = time.perf_counter() - started
    parts = [f"{summary.rows} {'row' if summary.rows == 1 else 'rows'} in {target}"]
    if summary.earlier:
        parts.append(f"{summary.earlier} from an earlier run")
    if summary.failed:
        parts.append(f"{summary.failed} recorded as errors")
    parts.append(f"generated {summary.new_tokens} tokens in {seconds:,.1f} s")
    click.echo(", ".join(parts), err=True)
