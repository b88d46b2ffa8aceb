"""Define the command ``gemma3-export data``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_export.cli.options import (
    PATH,
    TEXT_PATH,
    Number,
    force_option,
    integer,
    reject_if_given,
)
from gemma3_export.cli.styles import styled
from gemma3_export.limits import BELOW_1, check_number
from gemma3_export.progress import ProgressBars
from gemma3_export.reference.training.options import LOSS_ON, LossOn

if TYPE_CHECKING:
    from gemma3_export.reference.training.documents import DocumentSource
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["data"]

TINY_STORIES = "roneneldan/TinyStories"  # used by --dataset without a name
EPILOG = """\b
Examples:
  gemma3-export data -o tokens
  gemma3-export data book.txt articles/ --vocab-size 8192 -o tokens
  gemma3-export data --dataset roneneldan/TinyStories --tokenizer tiktoken:gpt2 -o stories
  gemma3-export data notes/ --tokenizer gemma-3-270m/tokenizer.json -o tokens
  gemma3-export data chats.jsonl --tokenizer gemma-3-270m-it -o chats
"""


@click.command(epilog=EPILOG)
@click.argument("paths", nargs=-1, metavar="[TEXT]...", type=TEXT_PATH)
@click.option(
    "--dataset",
    is_flag=False,
    flag_value=TINY_STORIES,
    metavar="NAME",
    help=f"Hugging Face dataset; {TINY_STORIES} if no name is given.",
)
@click.option(
    "--column",
    metavar="NAME",
    help="Column of a dataset or of JSONL rows: messages, prompt (with completion), or any that "
    "holds text.  [default: text for a dataset; for JSONL, whichever of these the rows have]",
)
@click.option(
    "--limit",
    type=integer(),
    metavar="N",
    help="Use only the first N rows of each split.",
)
@click.option(
    "--tokenizer",
    "tokenizer_path",
    metavar="PATH",
    help="tokenizer.json, its folder, a .gguf file, or tiktoken:NAME.  [default: a small BPE "
    "tokenizer trained on the text]",
)
@click.option(
    "--vocab-size",
    type=integer(),
    metavar="N",
    help="Vocabulary size of the small BPE tokenizer.  [default: 2048]",
)
@click.option(
    "--loss-on",
    type=click.Choice(LOSS_ON),
    default="answers",
    show_default=True,
    help="Tokens of conversations and prompt-completion pairs that the loss counts: the answers, "
    "or all. In plain text, all tokens count.",
)
@click.option(
    "--parse-special-tokens",
    is_flag=True,
    help="Encode special tokens spelled out in plain text, such as <start_of_turn>, as one token.  "
    "[default: as plain characters]",
)
@click.option(
    "--validation-fraction",
    type=Number(float, partial(check_number, "it", least=0, most=BELOW_1)),
    default=0.05,
    show_default=True,
    metavar="F",
    help="Fraction of the text held out for validation.",
)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to create.")
@force_option
def data(
    paths: tuple[Path, ...],
    dataset: str | None,
    column: str | None,
    limit: int | None,
    tokenizer_path: str | None,
    vocab_size: int | None,
    loss_on: LossOn,
    parse_special_tokens: bool,
    validation_fraction: float,
    output: Path,
    force: bool,
) -> None:
    """Tokenize text for training.

    TEXT is any number of UTF-8 files and folders. The lines of .jsonl files are rows: conversations
    (messages), pairs of prompt and completion, or text. Without TEXT and --dataset, the
    documentation and source code of Python's standard library are used, so no network is needed.
    To resume an interrupted run, repeat the same command.
    """
    if paths and dataset is not None:
        raise click.UsageError("give TEXT or --dataset, not both")
    if tokenizer_path is not None and vocab_size is not None:
        raise click.UsageError(
            "--vocab-size applies to the small BPE tokenizer; omit it or --tokenizer"
        )

    from gemma3_export.reference.training.preparation import prepare_tokens
    from gemma3_export.staging import reject_existing

    reject_existing(output, force=force)
    source = _open_source(paths, dataset, column, limit)
    for line in source.warnings:
        click.echo(styled(f"warning: {line}"), err=True)
    if not source.has_rows:
        reason = (
            "it applies to messages, and to prompt and completion, in .jsonl files or a dataset"
        )
        reject_if_given("loss_on", "--loss-on", reason)
    with ProgressBars() as progress:
        meta = prepare_tokens(
            source,
            _open_tokenizer(source, tokenizer_path, vocab_size or 2048),
            output,
            validation_fraction=validation_fraction,
            loss_on=loss_on,
            parse_special_tokens=parse_special_tokens,
            force=force,
            progress=progress,
            warn=lambda line: click.echo(styled(f"warning: {line}"), err=True),
        )
    train, held = meta.tokens["train"], meta.tokens["validation"]
    click.echo(
        f"{output}: {train:,} training and {held:,} validation tokens ({meta.dtype}), vocabulary "
        f"of {meta.vocab_size:,}, {sum(meta.characters.values()) / (train + held):.2f} characters "
        "per token"
    )
    if meta.learned_tokens is not None:
        learned = sum(meta.learned_tokens.values())
        what = "answers, and only they are learned" if loss_on == "answers" else "learned"
        click.echo(f"{learned:,} of these {train + held:,} tokens are {what}")
        click.echo(f"next: gemma3-export train {output} --weights MODEL -o run")
        return
    click.echo(f"next: gemma3-export train {output} --size demo -o run")


def _open_source(
    paths: tuple[Path, ...], dataset: str | None, column: str | None, limit: int | None
) -> DocumentSource:
    from gemma3_export.reference.training.documents import HubDataset, LocalFiles, PythonLibrary
    from gemma3_export.reference.training.rows import TEXT

    if dataset is not None:
        return HubDataset(dataset, column=column or TEXT, limit=limit)
    return LocalFiles(paths, column=column) if paths else PythonLibrary()


def _open_tokenizer(source: DocumentSource, path: str | None, vocab_size: int) -> Tokenizer:
    if path is None:
        from gemma3_export.reference.training.preparation import train_bpe

        click.echo(f"training a BPE tokenizer with {vocab_size:,} tokens on the text", err=True)
        return train_bpe(source, vocab_size)
    from gemma3_export.tokenizer import load_tokenizer

    return load_tokenizer(path)
