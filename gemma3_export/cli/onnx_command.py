"""``gemma3-export onnx``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_export.cli.progress_bars import ProgressBars

if TYPE_CHECKING:
    from gemma3_export.exporters.bundle_export import ExportResult
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["DTYPES", "TARGETS", "onnx"]

# Repeated from the exporters, which need torch to be imported; a test holds them equal.
TARGETS = ("ort", "portable")
DTYPES = ("fp32",)
TIKTOKEN_PREFIX = "tiktoken:"
EPILOG = """\b
Examples:
  gemma3-export onnx --size 270m -o gemma-3-270m
  gemma3-export onnx --weights model.gguf --target portable -o out
  gemma3-export onnx --weights checkpoint.pt --config config.json --tokenizer tokenizer.json -o out
  gemma3-export onnx --size 1b --random-weights 0 -o random-1b
"""


@click.command(epilog=EPILOG)
@click.option("--weights", metavar="SRC", help="Hub id, folder, .safetensors, .gguf or .pt file.")
@click.option(
    "--size", metavar="S", help="Published size, such as 270m or 4b-it; alone: from the Hub."
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="config.json to use instead of the one that comes with the weights.",
)
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option("--hf-token", metavar="TOKEN", help="Hub access token (default: HF_TOKEN or login).")
@click.option(
    "--random-weights", type=int, metavar="SEED", help="Draw weights of --size or --config."
)
@click.option(
    "--tokenizer",
    "tokenizer_path",
    metavar="PATH",
    help="tokenizer.json, its folder, a .gguf file, or tiktoken:NAME (default: the weights' own).",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="ort",
    show_default=True,
    help="ort: ONNX Runtime's fused kernels. portable: standard operators only.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder to create.",
)
@click.option("--no-verify", is_flag=True, help="Skip the parity check; the bundle says so.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def onnx(
    weights: str | None,
    size: str | None,
    config_path: Path | None,
    revision: str | None,
    hf_token: str | None,
    random_weights: int | None,
    tokenizer_path: str | None,
    target: str,
    dtype: str,
    output: Path,
    no_verify: bool,
    force: bool,
) -> None:
    """Export Gemma 3 to ONNX and prove that the result computes what the model computes.

    The output is one folder that stands alone: graph, weights, config, tokenizer, a manifest with
    the hash of every file, and the parity report. It appears when all of it is there; an export
    that fails or is interrupted leaves nothing behind.
    """
    from gemma3_export.exporting import export_onnx, open_weights
    from gemma3_export.staging import refuse_existing

    refuse_existing(output, force=force)
    tokenizer = None if tokenizer_path is None else _load_tokenizer(tokenizer_path)
    source = open_weights(
        weights,
        size=size,
        config_path=config_path,
        revision=revision,
        token=hf_token,
        random_seed=random_weights,
    )
    with source, ProgressBars() as progress:
        result = export_onnx(
            source,
            output,
            target=target,
            dtype=dtype,
            tokenizer=tokenizer,
            verify=not no_verify,
            force=force,
            progress=progress,
        )
        parameters = source.config.num_parameters
    _print_summary(result, target, dtype, parameters)


def _load_tokenizer(path: str) -> Tokenizer:
    if path.startswith(TIKTOKEN_PREFIX):
        from gemma3_export.tiktoken_tokenizer import load_tiktoken

        return load_tiktoken(path.removeprefix(TIKTOKEN_PREFIX))
    from gemma3_export.tokenizer import load_tokenizer

    return load_tokenizer(path)


def _print_summary(result: ExportResult, target: str, dtype: str, parameters: int) -> None:
    path = result.path
    click.echo(
        f"{path}: {parameters / 1e6:,.1f}M parameters, {dtype}, target {target}, "
        f"{result.size_bytes / 1e6:,.1f} MB"
    )
    click.echo(f"export: {result.seconds['export']:.1f} s")
    if result.verified:
        click.echo(f"parity: {_parity_line(path)} ({result.seconds['parity']:.1f} s)")
    else:
        click.echo(
            "parity: NOT CHECKED (--no-verify). Nothing shows that this bundle computes what the "
            f"model computes; to check it: gemma3-export verify {path}"
        )
    if (path / "tokenizer.json").is_file():
        click.echo(f'next: gemma3-export generate {path} --prompt "The sea is"')
    else:
        click.echo("no tokenizer came with the weights; --tokenizer adds one, or give token ids")
        click.echo(f"next: gemma3-export generate {path} --prompt-ids 2")


def _parity_line(path: Path) -> str:
    from gemma3_export.bundle import PARITY
    from gemma3_export.inspection import parity_line

    return parity_line(json.loads((path / PARITY).read_text(encoding="utf-8"))["onnx"])
