"""Options that the commands that generate share: sampling, ends, and how to open the bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gemma3_export.bundle import RUNTIMES
from gemma3_export.cli.options import (
    REAL,
    TEXT_PATH,
    WHOLE,
    CudaRequest,
    cuda_options,
    integer,
    note_variant,
    runtime_threads_option,
    variant_option,
)
from gemma3_export.limits import TOKEN_ID

if TYPE_CHECKING:
    from gemma3_export.api.model import Model
    from gemma3_export.api.model_files import Weights
    from gemma3_export.bundle import Bundle
    from gemma3_export.runtimes.generation.request import Completion

__all__ = [
    "CHAT_MAX_NEW_TOKENS",
    "OpeningRequest",
    "chat_sampling_options",
    "note_incomplete",
    "note_unused_seed",
    "note_variant_of",
    "opening_options",
    "sampling_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])

MAX_NEW_TOKENS = 128
CHAT_MAX_NEW_TOKENS = 1024
SAMPLING = (
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
        "--frequency-penalty",
        type=REAL,
        default=0.0,
        show_default=True,
        metavar="F",
        help="Subtract F from a token's logit for each time it occurs in the answer, -2 to 2.",
    ),
    click.option(
        "--presence-penalty",
        type=REAL,
        default=0.0,
        show_default=True,
        metavar="P",
        help="Subtract P from a token's logit if it occurs in the answer, -2 to 2.",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="ID=B",
        callback=lambda context, parameter, biases: logit_bias_of(biases),
        help="Add B, -100 to 100, to the logit of a token; repeatable.",
    ),
    click.option(
        "--seed",
        type=WHOLE,
        metavar="N",
        help="Seed of the sampling; the same seed gives the same text.  [default: a random one]",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="Stop before this text; repeatable.",
    ),
    click.option(
        "--stop-token",
        "stop_tokens",
        multiple=True,
        metavar="TOKEN",
        callback=lambda context, parameter, tokens: stop_tokens_of(tokens),
        help="Stop at this token, an id or a name such as <end_of_turn>; repeatable.",
    ),
    click.option(
        "--show-special",
        "show_special_tokens",
        is_flag=True,
        help="Include special tokens that are generated in the text.",
    ),
    click.option(
        "--json-schema",
        type=TEXT_PATH,
        callback=lambda context, parameter, path: None if path is None else read_schema(path),
        metavar="FILE",
        help="Generate JSON that validates against the JSON schema in this file.",
    ),
    click.option(
        "--regex",
        metavar="PATTERN",
        help="Generate a text that this regular expression matches as a whole.",
    ),
)
OPENING = (
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    cuda_options,
    click.option(
        "--runtime",
        type=click.Choice(RUNTIMES),
        help="Which of the bundle's exports to run.  [default: onnx, or the only one that it has]",
    ),
    variant_option,
    runtime_threads_option,
    click.option(
        "--share-weights",
        is_flag=True,
        help="fp32 on the CPU: share the weights between processes and load instantly; prompts "
        "take longer.",
    ),
    click.option(
        "--huge-pages/--no-huge-pages",
        default=None,
        help="Keep weights in huge pages, which makes decoding on the CPU faster (Linux).  "
        "[default: if the C library can allocate them; always in serve]",
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
    """Add the options of sampling and of where a generation ends.

    The command receives them under the names of :class:`gemma3_export.api.options.GenerateOptions`.
    """
    return _with_options(command, (_limit_option(MAX_NEW_TOKENS, "prompt"), *SAMPLING))


def chat_sampling_options(command: Command) -> Command:
    """Add the same options for a conversation, whose answers may be longer."""
    return _with_options(command, (_limit_option(CHAT_MAX_NEW_TOKENS, "answer"), *SAMPLING))


def _limit_option(default: int, what: str) -> Callable[[Command], Command]:
    return click.option(
        "--max-new-tokens",
        type=integer(),
        default=default,
        show_default=True,
        metavar="N",
        help=f"Most tokens to generate per {what}.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OpeningRequest:
    """Which graph of a bundle to open, and where, as given on the command line."""

    device: str
    cuda: CudaRequest
    runtime: str | None
    variant: str | None
    threads: int | None
    share_weights: bool
    huge_pages: bool | None
    trust: bool
    check: bool

    def files(self, path: Path) -> Bundle | Weights:
        """Open the files of a bundle, or weights.

        Raises:
            InputError: there is neither at ``path``, or they are damaged.
        """
        from gemma3_export.api.model_files import open_files

        return open_files(path, self.variant)

    def loading(self, files: Bundle | Weights) -> dict[str, Any]:
        """Return the fields of :class:`gemma3_export.LoadOptions` that were asked for.

        Raises:
            click.UsageError: an option cannot have an effect.
        """
        from gemma3_export.api.model_files import AUTO, choose_runtime

        runtime = choose_runtime(files, AUTO if self.runtime is None else self.runtime)
        device, cuda_options = self.cuda.settle(self.device, runtime)
        return {
            "runtime": runtime,
            "device": device,
            "threads": self.threads,
            "trust": self.trust,
            "check": self.check,
            "cuda": cuda_options,
            "shares_weights": self.share_weights,
            "huge_pages": bool(self.huge_pages),
        }

    def open(self, path: Path, *, warm_up: bool = False) -> Model:
        """Open a bundle, or weights; the graph itself opens with the first generation.

        Weights come with a note that an export is faster.

        Raises:
            click.UsageError: an option cannot have an effect.
            InputError: there is neither a bundle nor weights at ``path``, or they are damaged.
            UnavailableError: a package is missing.
        """
        from gemma3_export.api.model import Model
        from gemma3_export.api.model_files import Weights

        files = self.files(path)
        model = Model(files, warm_up=warm_up, **self.loading(files))
        if isinstance(files, Weights):
            click.echo(
                f"note: {path} is not an export, so it runs in PyTorch; faster: gemma3-export onnx "
                f"--weights {path} -o DIR",
                err=True,
            )
        return model


def note_variant_of(model: Model) -> None:
    """Say on stderr which of a bundle's variants a model runs, if none was chosen."""
    if model.variant is not None:
        note_variant(model.bundle, model.variant)


def opening_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which graph of a bundle to open, and where.

    The command receives them as an :class:`OpeningRequest` named ``opening``.
    """

    @functools.wraps(command)
    def with_request(*arguments: Any, **options: Any) -> None:
        names = [field.name for field in fields(OpeningRequest)]
        opening = OpeningRequest(**{name: options.pop(name) for name in names})
        command(*arguments, opening=opening, **options)

    return _with_options(with_request, OPENING)


def _with_options(command: Command, options: Sequence[Callable[..., Any]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def stop_tokens_of(tokens: Sequence[str]) -> tuple[int | str, ...]:
    """Return the values of ``--stop-token``: ids as integers, and names."""
    return tuple(int(token) if TOKEN_ID.fullmatch(token) else token for token in tokens)


def logit_bias_of(biases: Sequence[str]) -> dict[int, float] | None:
    """Return the value of ``--logit-bias``: numbers by token id.

    Raises:
        click.BadParameter: one is not ``ID=B``, or a token has two.
    """
    found: dict[int, float] = {}
    for text in biases:
        token, _, bias = text.partition("=")
        try:
            token_id, value = int(token) if TOKEN_ID.fullmatch(token) else -1, float(bias)
        except ValueError:
            token_id = -1
        if token_id < 0:
            raise click.BadParameter(f"{text!r:.60} is not ID=B, such as 236761=-5")
        if token_id in found:
            raise click.BadParameter(f"token {token_id} has two biases; leave one of them out")
        found[token_id] = value
    return found or None


def read_schema(path: Path) -> str:
    """Return the value of ``--json-schema``: the text of a file.

    Raises:
        InputError: it cannot be read, is too large, or is not UTF-8.
    """
    from gemma3_export.files import read_text
    from gemma3_export.runtimes.structured.json_schema import MAX_SCHEMA_BYTES

    return read_text(path, limit_bytes=MAX_SCHEMA_BYTES, or_pipe=True)


def note_incomplete(completions: Sequence[Completion]) -> None:
    """Say on stderr that texts were cut off before they match ``--json-schema`` or ``--regex``."""
    if count := sum(completion.is_complete is False for completion in completions):
        what = "the text is" if len(completions) == 1 else f"{count} texts are"
        click.echo(
            f"note: {what} incomplete, because generation ended before --json-schema or --regex "
            "was matched; raise --max-new-tokens",
            err=True,
        )


def note_unused_seed(seed: int | None, *, is_greedy: bool) -> None:
    """Say on stderr that a seed was given that changes nothing."""
    if seed is not None and is_greedy:
        click.echo(
            "note: --seed has no effect, because greedy decoding draws nothing; to sample, add "
            "--temperature, --top-k, --top-p or --min-p",
            err=True,
        )
