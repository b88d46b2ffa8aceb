"""Options that the commands that generate share: sampling, ends, and how to open the bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from gemma3_export.bundle import RUNTIMES
from gemma3_export.cli.options import REAL, THREADS, WHOLE, cuda_options, integer

__all__ = ["note_unused_seed", "opening_options", "sampling_options", "stop_tokens_of"]

Command = TypeVar("Command", bound=Callable[..., Any])

SAMPLING = (
    click.option(
        "--max-new-tokens",
        type=integer(),
        default=128,
        show_default=True,
        metavar="N",
        help="Most tokens to generate per prompt.",
    ),
    click.option(
        "--temperature",
        type=REAL,
        metavar="T",
        help="Sampling temperature; 0 is greedy.  [default: 0; 1 with a filter]",
    ),
    click.option("--top-k", type=WHOLE, metavar="K", help="Sample from the K most likely tokens."),
    click.option(
        "--top-p",
        type=REAL,
        metavar="P",
        help="Sample from the most likely tokens whose probabilities add up to P.",
    ),
    click.option(
        "--min-p",
        type=REAL,
        metavar="P",
        help="Drop tokens less likely than P times the most likely one.",
    ),
    click.option(
        "--repetition-penalty",
        type=REAL,
        default=1.0,
        show_default=True,
        metavar="R",
        help="Penalize tokens that occurred before; 1 is off.",
    ),
    click.option(
        "--seed",
        type=WHOLE,
        metavar="N",
        help="The same seed gives the same text. The JSON reports it; null for greedy.",
    ),
    click.option(
        "--stop",
        "stop_texts",
        multiple=True,
        metavar="TEXT",
        help="Stop before this text; repeatable.",
    ),
    click.option(
        "--stop-token",
        "stop_tokens",
        multiple=True,
        metavar="TOKEN",
        help="Stop at this token, an id or a name such as <end_of_turn>; repeatable.",
    ),
    click.option(
        "--show-special",
        is_flag=True,
        help="Include special tokens that are generated in the text.",
    ),
)
OPENING = (
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    cuda_options,
    click.option(
        "--runtime",
        type=click.Choice(RUNTIMES),
        default="onnx",
        show_default=True,
        help="Which of the bundle's exports to run.",
    ),
    click.option(
        "--threads",
        type=THREADS,
        metavar="N",
        help="Intra-op threads.  [default: chosen by the runtime]",
    ),
    click.option(
        "--share-weights",
        is_flag=True,
        help="fp32 on the CPU: share the weights between processes and load instantly; prompts "
        "take longer.",
    ),
    click.option(
        "--trust", is_flag=True, help="Load a torch archive that is not the one that was exported."
    ),
    click.option(
        "--check",
        is_flag=True,
        help="Hash every file of the bundle first. By default only a sample of files above 32 MiB "
        "is hashed, which can miss edits that keep the size.",
    ),
)


def sampling_options(command: Command) -> Command:
    """Add the options of sampling, and those that say where a generation ends."""
    return _with_options(command, SAMPLING)


def opening_options(command: Command) -> Command:
    """Add the options that say which graph of a bundle to open, and where."""
    return _with_options(command, OPENING)


def _with_options(command: Command, options: Sequence[Callable[..., Any]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def stop_tokens_of(tokens: Sequence[str]) -> tuple[int | str, ...]:
    """Return the values of ``--stop-token``: ids as integers, and names."""
    return tuple(int(token) if re.fullmatch(r"[0-9]{1,10}", token) else token for token in tokens)


def note_unused_seed(seed: int | None, *, is_greedy: bool) -> None:
    """Say on stderr that a seed was given that changes nothing."""
    if seed is not None and is_greedy:
        click.echo(
            "note: --seed has no effect, because greedy decoding draws nothing; to sample, add "
            "--temperature, --top-k, --top-p or --min-p",
            err=True,
        )
