"""The options and the summary that ``onnx``, ``torchscript`` and ``pt2`` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from gemma3_export.cli.options import (
    PATH,
    SEED,
    adapter_option,
    describe_adapter,
    describe_reduction,
    force_option,
    hf_token_option,
    reduce_vocab_option,
    revision_option,
    threads_option,
    tokenizer_option,
)
from gemma3_export.config import TOKENIZER_NAME
from gemma3_export.files import is_file
from gemma3_export.progress import Progress, ProgressBars

if TYPE_CHECKING:
    from gemma3_export.exporters.bundle_writer import ExportResult
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["ExportOptions", "export_options", "run_export"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """The shared options as given on the command line."""

    weights: str | None
    adapter: str | None
    size: str | None
    config_path: Path | None
    revision: str | None
    hf_token: str | None
    random_weights: int | None
    tokenizer_path: str | None
    reduce_vocab: str | None
    output: Path
    no_verify: bool
    force: bool
    threads: int | None


class Export(Protocol):
    """An export function of the API, with the options of its format applied."""

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
        """Export ``source`` to ``output``."""


EXPORT_OPTIONS = (
    click.option(
        "--weights",
        metavar="SRC",
        help="Hub id, folder, .safetensors, .gguf or .pt file; demo is the model in this package.",
    ),
    adapter_option,
    click.option("--size", metavar="S", help="Published size, such as 270m or 4b-it."),
    click.option(
        "--config",
        "config_path",
        type=PATH,
        help="config.json to use instead of the one that comes with the weights.",
    ),
    revision_option,
    hf_token_option,
    click.option(
        "--random-weights", type=SEED, metavar="SEED", help="Random weights for --size or --config."
    ),
    tokenizer_option,
    reduce_vocab_option,
    click.option(
        "-o",
        "--output",
        type=PATH,
        required=True,
        help="Folder to create, or a bundle of the same weights to add this format to.",
    ),
    click.option(
        "--no-verify", is_flag=True, help="Skip the parity check; the bundle records that."
    ),
    force_option,
    threads_option,
)


def export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options; ``command`` receives them as its first argument."""

    @wraps(command)
    def collect(**values: Any) -> None:
        own = {name: values.pop(name) for name in set(values) - set(ExportOptions.__slots__)}
        command(ExportOptions(**values), **own)

    wrapped: Callable[..., None] = collect
    for option in reversed(EXPORT_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def run_export(options: ExportOptions, runtime: str, description: str, export: Export) -> None:
    """Open the weights, export them, and print a summary.

    Args:
        options: the shared options.
        runtime: the backend that runs the new graph.
        description: dtype and target, for the summary.
        export: an export function of the API.
    """
    from gemma3_export.api.exporting import open_weights
    from gemma3_export.reference.weights.reduced_vocabulary import reduce_vocabulary
    from gemma3_export.tokenizer import load_tokenizer

    reject_early(options.output, runtime, force=options.force)
    tokenizer = None if options.tokenizer_path is None else load_tokenizer(options.tokenizer_path)
    source = open_weights(
        options.weights,
        adapter=options.adapter,
        size=options.size,
        config_path=options.config_path,
        revision=options.revision,
        token=options.hf_token,
        random_seed=options.random_weights,
    )
    with source, ProgressBars() as progress:
        exported, reduced = source, None
        if options.reduce_vocab is not None:
            exported = reduced = reduce_vocabulary(source, options.reduce_vocab, tokenizer)
            tokenizer = reduced.tokenizer
        result = export(
            exported,
            options.output,
            tokenizer=tokenizer,
            verify=not options.no_verify,
            force=options.force,
            threads=options.threads,
            progress=progress,
        )
        parameters = exported.config.num_parameters
        model = f"{parameters / 1e6:,.1f}M parameters{describe_adapter(source)}"
    vocabulary = (
        "" if reduced is None else describe_reduction(reduced, result.size_bytes / parameters)
    )
    print_summary(result, runtime, f"{model}, {description}", vocabulary)


def reject_early(output: Path, runtime: str, *, force: bool) -> None:
    """Reject an unusable output before weights are downloaded.

    A bundle without a graph for ``runtime`` is a legal output: the graph is added to it.
    """
    from gemma3_export.bundle import MANIFEST, Bundle
    from gemma3_export.staging import reject_existing

    if not force and is_file(output / MANIFEST):
        runtimes = [graph.runtime for graph in Bundle(output).manifest.graphs]
        if runtime not in runtimes:
            return
    reject_existing(output, force=force)


def print_summary(
    result: ExportResult, runtime: str, description: str, vocabulary: str = ""
) -> None:
    """Print the size and proof of a new graph, and last the command to try next."""
    from gemma3_export.bundle import Bundle
    from gemma3_export.bundle.inspection import rounding_line

    path = result.path
    click.echo(f"{path}: {description}, {result.size_bytes / 1e6:,.1f} MB")
    if vocabulary:
        click.echo(vocabulary)
    click.echo(f"export: {result.seconds['export']:.1f} s")
    if rounding := rounding_line(Bundle(path).graph(runtime).calibration):
        click.echo(f"rounded: {rounding}")
    suffix = "" if runtime == "onnx" else f" --runtime {runtime}"
    if result.verified:
        click.echo(f"parity: {proof_line(path, runtime)} ({result.seconds['parity']:.1f} s)")
    else:
        click.echo(
            "parity: NOT CHECKED (--no-verify). Nothing proves that this bundle computes what the "
            f"model computes; to check it: gemma3-export verify {path}{suffix}"
        )
    if is_file(path / TOKENIZER_NAME):
        click.echo(f'next: gemma3-export generate {path}{suffix} --prompt "The sea is"')
    else:
        click.echo("no tokenizer came with the weights; --tokenizer adds one, or give token ids")
        click.echo(f"next: gemma3-export generate {path}{suffix} --prompt-ids 2")


def proof_line(path: Path, runtime: str) -> str:
    """Return the new graph's parity report in one line."""
    from gemma3_export.bundle.inspection import parity_line, read_proofs

    return parity_line(read_proofs(path)[runtime])
