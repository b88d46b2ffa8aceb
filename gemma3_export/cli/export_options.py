"""The options and the summary that ``onnx``, ``torchscript`` and ``pt2`` share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
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
from gemma3_export.cli.styles import styled
from gemma3_export.config import TOKENIZER_NAME
from gemma3_export.dtypes import dtype_choices
from gemma3_export.files import is_file
from gemma3_export.progress import Progress, ProgressBars

if TYPE_CHECKING:
    from gemma3_export.bundle import Graph
    from gemma3_export.exporters.bundle_writer import ExportResult
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["ExportOptions", "dtype_option", "export_options", "run_export"]


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
        help="Folder to create, or a bundle of the same weights to add to.",
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


def dtype_option(backend: str, text: str) -> Callable[..., Any]:
    """Return the option ``--dtype`` of an export for ``backend``, with help on its values."""
    return click.option(
        "--dtype",
        "dtypes",
        multiple=True,
        type=click.Choice(dtype_choices(backend)),
        default=("fp32",),
        show_default=True,
        help=f"{text} Repeat the option for several variants in one bundle.",
    )


def run_export(
    options: ExportOptions, runtime: str, variants: Sequence[str], description: str, export: Export
) -> None:
    """Open the weights, export them, and print a summary.

    Args:
        options: the shared options.
        runtime: the backend that runs the new graphs.
        variants: the names of the new graphs' variants.
        description: dtypes and target, for the summary.
        export: an export function of the API.
    """
    from gemma3_export.api.verification import require_packages

    require_packages()  # before what imports torch

    from gemma3_export.api.exporting import open_weights
    from gemma3_export.reference.weights.reduced_vocabulary import reduce_vocabulary
    from gemma3_export.tokenizer import load_tokenizer

    reject_early(options.output, runtime, variants, force=options.force)
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
    print_summary(result, f"{model}, {description}", vocabulary)


def reject_early(output: Path, runtime: str, variants: Sequence[str], *, force: bool) -> None:
    """Reject an unusable output before weights are downloaded.

    A bundle without these variants for ``runtime`` is a legal output: they are added to it.
    """
    from gemma3_export.bundle import MANIFEST, Bundle
    from gemma3_export.staging import reject_existing

    if not force and is_file(output / MANIFEST):
        bundle = Bundle(output)
        for variant in variants:
            bundle.require_vacant(runtime, variant)
        return
    reject_existing(output, force=force)


def print_summary(result: ExportResult, description: str, vocabulary: str = "") -> None:
    """Print the size and proofs of new graphs, and last the command to try next."""
    from gemma3_export.bundle.inspection import parity_line, read_proofs, rounding_line

    path, is_one = result.path, len(result.graphs) == 1
    folder = shlex.quote(str(path))
    click.echo(f"{path}: {description}, {result.size_bytes / 1e6:,.1f} MB")
    if vocabulary:
        click.echo(vocabulary)
    parity = f", parity check: {result.seconds['parity']:.1f} s" if result.verified else ""
    click.echo(f"export: {result.seconds['export']:.1f} s{parity}")
    for graph in result.graphs:
        if rounding := rounding_line(graph.calibration):
            click.echo(f"rounded{'' if is_one else f' ({graph.variant})'}: {rounding}")
    first = selecting_options(path, result.graphs[0])
    if result.verified:
        proofs = read_proofs(path)
        for graph in result.graphs:
            label = "parity" if is_one else f"parity of {graph.variant}"
            click.echo(styled(f"{label}: {parity_line(proofs[graph.path])}"))
    else:
        click.echo(
            styled(
                "parity: NOT CHECKED (--no-verify). Nothing proves that this bundle computes what "
                "the model computes; to prove it: "
                f"gemma3-export verify {folder}{first} --weights SRC --stamp"
            )
        )
    if is_file(path / TOKENIZER_NAME):
        click.echo(f'next: gemma3-export generate {folder}{first} --prompt "The sea is"')
    else:
        click.echo("no tokenizer came with the weights; --tokenizer adds one, or give token ids")
        click.echo(f"next: gemma3-export generate {folder}{first} --prompt-ids 2")


def selecting_options(path: Path, graph: Graph) -> str:
    """Return the options with which a command uses ``graph``, if it is not the default one."""
    from gemma3_export.bundle import Bundle

    options = "" if graph.runtime == "onnx" else f" --runtime {graph.runtime}"
    is_default = Bundle(path).graph(graph.runtime).variant == graph.variant
    return options if is_default else f"{options} --variant {graph.variant}"
