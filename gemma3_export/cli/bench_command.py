"""``gemma3-export bench``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from gemma3_export.bundle import RUNTIMES

__all__ = ["bench"]

PEERS = ("transformers", "reference")
EPILOG = """\b
Examples:
  gemma3-export bench gemma-3-270m
  gemma3-export bench gemma-3-270m --threads 2 --against transformers
  gemma3-export bench gemma-3-270m --prompt-tokens 2048 --batch 4 --repeat 5 --json
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, metavar="N"
)
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N"
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="By default all processors."
)
@click.option("--runtime", type=click.Choice(RUNTIMES), default="onnx", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Measurements of each candidate.",
)
@click.option(
    "--against", type=click.Choice(PEERS), help="A peer that is measured in turns with the bundle."
)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def bench(bundle_path: Path, as_json: bool, **options: Any) -> None:
    """Measure load time, prefill, decode and memory, each candidate in its own process.

    With --against the candidates take turns on the same prompts, and the ratios of each round are
    printed: above 1 the bundle is better.
    """
    from gemma3_export.benchmark import BenchmarkOptions, run_benchmark

    report = run_benchmark(bundle_path, BenchmarkOptions(**options))
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(_lines(report)))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    machine, options = report["machine"], report["options"]
    yield (
        f"{machine['processor']}, {machine['processors']} processors, {machine['system']}, "
        f"load {machine['load_average']:.1f}"
    )
    yield (
        f"{options['prompt_tokens']} prompt tokens, {options['new_tokens']} new tokens, batch "
        f"{options['batch']}, {options['threads']} threads; median (least to greatest) of "
        f"{options['repeat']}"
    )
    for name, candidate in report["candidates"].items():
        yield ""
        facts = candidate["describe"]
        details = (f"{key} {value}" for key, value in facts.items() if key != "runtime")
        yield f"{name}: {', '.join(details)}"
        yield from _candidate_lines(candidate)
    if "ratios" in report:
        yield ""
        yield from _ratio_lines(report)


def _candidate_lines(candidate: Mapping[str, Any]) -> Iterator[str]:
    yield f"  load                 {candidate['load_s']:.2f} s"
    yield f"  time to first token  {_spread(candidate['time_to_first_token_s'], 3)} s"
    yield f"  prefill              {_spread(candidate['prefill_tokens_per_s'], 1)} tokens/s"
    yield f"  decode               {_spread(candidate['decode_tokens_per_s'], 1)} tokens/s"
    yield f"  peak memory          {candidate['peak_memory_bytes'] / 1e9:.2f} GB"


def _ratio_lines(report: Mapping[str, Any]) -> Iterator[str]:
    ours, peer = report["candidates"]
    ratios = report["ratios"]
    yield f"{ours} against {peer} (above 1: {ours} is better)"
    yield f"  prefill  {_spread(ratios['prefill'], 2)} x"
    yield f"  decode   {_spread(ratios['decode'], 2)} x"
    yield f"  load     {ratios['load']:.2f} x"
    yield f"  memory   {ratios['memory']:.2f} x"
    yield f"  rows with the same greedy tokens: {report['same_tokens']:.0%}"


def _spread(values: Mapping[str, float], digits: int) -> str:
    low, high = values["min"], values["max"]
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
