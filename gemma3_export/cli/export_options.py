"""What exporting commands share: where weights come from, where the bundle goes, the summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from gemma3_export.progress import ProgressBars

if TYPE_CHECKING:
    from gemma3_export.exporters.bundle_writer import ExportResult, Progress
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.tokenizer.tokenizer import Tokenizer

__all__ = ["ExportOptions", "export_options", "run_export", "threads_option"]

TIKTOKEN_PREFIX = "tiktoken:"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """The shared options, as given."""

    weights: str | None
    size: str | None
    config_path: Path | None
    revision: str | None
    hf_token: str | None
    random_weights: int | None
    tokenizer_path: str | None
    output: Path
    no_verify: bool
    force: bool
    threads: int | None


class Export(Protocol):
    """The part that differs between the commands."""

    def __call__(
        self,
        source: WeightSource,
        output: Path,
        *,
        tokenizer: Tokenizer | None,
        verify: bool,
        force: bool,
        threads: int | None,
        progress: Progress,
    ) -> ExportResult:
        """Export in one format."""


threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads an operator, of torch and ONNX Runtime [default: all processors; 1 for fewer "
    "than 20M parameters].",
)
OPTIONS = (
    click.option(
        "--weights",
        metavar="SRC",
        help="Hub id, folder, .safetensors, .gguf or .pt; demo: the model in this package.",
    ),
    click.option("--size", metavar="S", help="Published size, such as 270m or 4b-it."),
    click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        help="config.json to use instead of the one that comes with the weights.",
    ),
    click.option("--revision", help="Branch, tag or commit of a Hub repository."),
    click.option(
        "--hf-token", metavar="TOKEN", help="Hub access token (default: HF_TOKEN or login)."
    ),
    click.option(
        "--random-weights", type=int, metavar="SEED", help="Draw weights of --size or --config."
    ),
    click.option(
        "--tokenizer",
        "tokenizer_path",
        metavar="PATH",
        help="tokenizer.json, its folder, a .gguf file, or tiktoken:NAME (default: the weights').",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        help="The folder to create, or a bundle of the same weights to add this format to.",
    ),
    click.option("--no-verify", is_flag=True, help="Skip the parity check; the bundle says so."),
    click.option(
        "--force", is_flag=True, help="Replace an existing folder that this program made."
    ),
    threads_option,
)


def export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options; ``command`` gets them as its first argument."""

    @wraps(command)
    def collect(**values: Any) -> None:
        own = {name: values.pop(name) for name in set(values) - set(ExportOptions.__slots__)}
        command(ExportOptions(**values), **own)

    wrapped: Callable[..., None] = collect
    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def run_export(options: ExportOptions, runtime: str, description: str, export: Export) -> None:
    """Open the weights, export them, and say what was made.

    Args:
        options: the shared options.
        runtime: the backend that runs the new graph.
        description: dtype and target, for the summary.
        export: writes the bundle.
    """
    from gemma3_export.api.exporting import open_weights

    refuse_early(options.output, runtime, force=options.force)
    tokenizer = None if options.tokenizer_path is None else load_tokenizer(options.tokenizer_path)
    source = open_weights(
        options.weights,
        size=options.size,
        config_path=options.config_path,
        revision=options.revision,
        token=options.hf_token,
        random_seed=options.random_weights,
    )
    with source, ProgressBars() as progress:
        result = export(
            source,
            options.output,
            tokenizer=tokenizer,
            verify=not options.no_verify,
            force=options.force,
            threads=options.threads,
            progress=progress,
        )
        parameters = source.config.num_parameters
    print_summary(result, runtime, f"{parameters / 1e6:,.1f}M parameters, {description}")


def refuse_early(output: Path, runtime: str, *, force: bool) -> None:
    """Complain about the output before weights are downloaded.

    A bundle that has no graph for ``runtime`` yet may get one.
    """
    from gemma3_export.bundle.bundle import MANIFEST, Bundle
    from gemma3_export.staging import refuse_existing

    if not force and (output / MANIFEST).is_file():
        runtimes = [graph.runtime for graph in Bundle(output).manifest.graphs]
        if runtime not in runtimes:
            return
    refuse_existing(output, force=force)


def load_tokenizer(path: str) -> Tokenizer:
    """A tokenizer file or folder, or a tiktoken encoding."""
    if path.startswith(TIKTOKEN_PREFIX):
        from gemma3_export.tokenizer.tiktoken_tokenizer import load_tiktoken

        return load_tiktoken(path.removeprefix(TIKTOKEN_PREFIX))
    from gemma3_export.tokenizer import tokenizer

    return tokenizer.load_tokenizer(path)


def print_summary(result: ExportResult, runtime: str, description: str) -> None:
    """What was made, whether it is proven, and what to type next."""
    path = result.path
    click.echo(f"{path}: {description}, {result.size_bytes / 1e6:,.1f} MB")
    click.echo(f"export: {result.seconds['export']:.1f} s")
    suffix = "" if runtime == "onnx" else f" --runtime {runtime}"
    if result.verified:
        click.echo(f"parity: {proof_line(path, runtime)} ({result.seconds['parity']:.1f} s)")
    else:
        click.echo(
            "parity: NOT CHECKED (--no-verify). Nothing shows that this bundle computes what the "
            f"model computes; to check it: gemma3-export verify {path}{suffix}"
        )
    if (path / "tokenizer.json").is_file():
        click.echo(f'next: gemma3-export generate {path}{suffix} --prompt "The sea is"')
    else:
        click.echo("no tokenizer came with the weights; --tokenizer adds one, or give token ids")
        click.echo(f"next: gemma3-export generate {path}{suffix} --prompt-ids 2")


def proof_line(path: Path, runtime: str) -> str:
    """The new graph's parity report in one line."""
    from gemma3_export.bundle.bundle import PARITY
    from gemma3_export.bundle.inspection import parity_line

    return parity_line(json.loads((path / PARITY).read_text(encoding="utf-8"))[runtime])
