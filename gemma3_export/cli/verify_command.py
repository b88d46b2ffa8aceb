"""Define the command ``gemma3-export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_export.bundle import RUNTIMES
from gemma3_export.cli.options import (
    PATH,
    SEED,
    CudaRequest,
    adapter_option,
    cuda_options,
    threads_option,
)
from gemma3_export.cli.styles import styled
from gemma3_export.progress import ProgressBars

if TYPE_CHECKING:
    from gemma3_export.parity import ParityReport

__all__ = ["verify"]

FAILED = 1
EPILOG = """\b
Examples:
  gemma3-export verify gemma-3-270m
  gemma3-export verify gemma-3-270m --weights google/gemma-3-270m --html report.html
  gemma3-export verify gemma-3-270m --against transformers
  gemma3-export verify gemma-3-270m --runtime torchscript --against onnx
  gemma3-export verify portable-export --against ort-export --junit parity.xml
  gemma3-export verify unproven --weights google/gemma-3-270m --stamp
  gemma3-export verify other-tool/model.onnx --weights google/gemma-3-270m
"""


@click.command(epilog=EPILOG)
@click.argument("path", metavar="DIR|GRAPH.onnx", type=PATH)
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="onnx",
    show_default=True,
    help="Which of the bundle's exports to check.",
)
@click.option(
    "--variant",
    metavar="NAME",
    help="Which of several graphs to check, such as fp32, int8 or int4-fp16.  [default: all]",
)
@click.option(
    "--weights", metavar="SRC", help="Weights to compare with.  [default: those in the bundle]"
)
@adapter_option
@click.option(
    "--tokenizer",
    metavar="TOK",
    help="Tokenizer for the cases with text: tokenizer.json, its folder or a .gguf file.  "
    "[default: that of the bundle, or of the weights]",
)
@click.option(
    "--against",
    metavar="OTHER",
    help="Compare with another runtime of this bundle, another bundle, transformers, or a Hugging "
    "Face folder, including its tokenizer, chat templates and special tokens.",
)
@click.option(
    "--stamp",
    is_flag=True,
    help="If the check passes, add its report to the bundle, as an export does. Needs --weights, "
    "the weights that the bundle was made from.",
)
@click.option("--report", "report_file", type=PATH, help="Write the report as JSON.")
@click.option("--junit", "junit_file", type=PATH, help="Write the report as JUnit XML.")
@click.option("--html", "html_file", type=PATH, help="Write the report as an HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random tokens.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@cuda_options
@threads_option
def verify(
    path: Path,
    runtime: str,
    variant: str | None,
    weights: str | None,
    adapter: str | None,
    tokenizer: str | None,
    against: str | None,
    stamp: bool,
    report_file: Path | None,
    junit_file: Path | None,
    html_file: Path | None,
    as_json: bool,
    seed: int,
    device: str,
    cuda: CudaRequest,
    threads: int | None,
) -> None:
    """Prove that an export matches the reference model.

    Verification checks the hash of every file, then compares logits and all cached keys and values
    in prefill, chunked prefill and cached decoding. Each error must stay below a small multiple of
    the reference's own rounding error, which is measured in the same run. The exit code is 1 if
    parity fails, for several variants if it fails for any.

    A graph that another tool exported, a .onnx file or a folder with one, is compared with
    --weights in the same way.

    On CUDA, the compared steps return all logits and therefore run without a captured CUDA graph.
    """
    from gemma3_export.api.other_graphs import find_graph
    from gemma3_export.api.verification import verify as verify_parity
    from gemma3_export.bundle import Bundle
    from gemma3_export.bundle.manifest import PARITY

    bundle = path if find_graph(path) else Bundle(path, variant)
    files = (report_file, junit_file, html_file)
    _check_files(*files)
    several: tuple[str, ...] = ()
    if isinstance(bundle, Bundle) and variant is None:
        several = tuple(bundle.variants(runtime))
    if len(several) > 1 and (as_json or any(files)):
        raise click.UsageError(
            f"{path} has the variants {', '.join(several)}, and a report describes one; "
            "choose it with --variant"
        )
    device, allowed = cuda.settle(device, runtime)
    failed = False
    for checked in several if len(several) > 1 else (variant,):
        with ProgressBars() as progress:
            report = verify_parity(
                bundle,
                runtime=runtime,
                variant=checked,
                device=device,
                cuda=allowed,
                threads=threads,
                weights=weights,
                adapter=adapter,
                tokenizer=tokenizer,
                against=against,
                stamp=stamp,
                seed=seed,
                progress=progress,
            )
        _write_reports(report, path.resolve().name, *files)
        if len(several) > 1:
            click.echo(f"variant {checked}:")
        _print_report(report, as_json=as_json)
        if stamp and report.passed:
            click.echo(f"stamped: {path / PARITY} has the report", err=True)
        failed = failed or not report.passed
    if failed:
        raise click.exceptions.Exit(FAILED)


def _check_files(*files: Path | None) -> None:
    """Check the places of the reports before the proof, which takes long.

    Raises:
        click.UsageError: two reports would get the same file.
        InputError: one cannot be written.
    """
    from gemma3_export.staging import check_writable

    given = [file.resolve() for file in files if file is not None]
    if len(set(given)) < len(given):
        raise click.UsageError("each of --report, --junit and --html needs a file of its own")
    for file in given:
        check_writable(file)


def _write_reports(
    report: ParityReport,
    name: str,
    json_file: Path | None,
    junit_file: Path | None,
    html_file: Path | None,
) -> None:
    from gemma3_export.parity import render_html, render_junit
    from gemma3_export.staging import write_text_atomically

    if json_file is not None:
        write_text_atomically(json_file, report.to_json())
    if junit_file is not None:
        write_text_atomically(junit_file, render_junit(report))
    if html_file is not None:
        write_text_atomically(html_file, render_html(report, name))


def _print_report(report: ParityReport, *, as_json: bool) -> None:
    from gemma3_export.parity import render_terminal

    click.echo(report.to_json() if as_json else styled(render_terminal(report)), nl=False)
