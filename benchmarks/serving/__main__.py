"""``python -m benchmarks.serving``: measure our server under load, next to llama-server."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from pydoc_data import topics
from typing import Any

import click
import numpy as np

from benchmarks.common import (
    bundle_argument,
    report_option,
    rounds_option,
    threads_option,
    write_report,
)
from benchmarks.serving.client import figures, put_under_load
from benchmarks.serving.llama_server import MODEL, PROGRAM, version_of
from benchmarks.serving.servers import Limits, Running, Server, llama_server, our_server, started
from gemma3_export import __version__
from gemma3_export.bench.machine import describe_machine
from gemma3_export.bench.report import aligned, scaled, spread
from gemma3_export.bundle import Bundle
from gemma3_export.config import TOKENIZER_NAME
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.processor_kind import Processor
from gemma3_export.processors import available_processors
from gemma3_export.runtimes.onnx.session import import_onnxruntime
from gemma3_export.serve.settings import MAX_CONNECTIONS
from gemma3_export.tokenizer import Tokenizer

__all__ = ["main"]

TEXT_CHARACTERS = 200_000
LEAST_REQUESTS = 8  # of a round, so that one client gives percentiles too
COLUMNS = {  # figure: title, digits
    "new_tokens_per_s": ("tokens/s", 1),
    "tokens_per_s": ("with prompts", 1),
    "first_token_p50_ms": ("first p50 ms", 0),
    "first_token_p95_ms": ("first p95 ms", 0),
    "between_tokens_p50_ms": ("between p50 ms", 1),
    "between_tokens_p95_ms": ("between p95 ms", 1),
}
RATIOS = {"tokens/s": "new_tokens_per_s"} | {
    title.removesuffix(" ms"): name for name, (title, _) in COLUMNS.items() if name.endswith("_ms")
}


def draw_prompts(
    text_ids: Sequence[int], bos_token_id: int, length: int, count: int, seed: int
) -> list[list[int]]:
    """Return ``count`` prompts of ``length`` tokens from random places of a text."""
    starts = np.random.default_rng(seed).integers(0, len(text_ids) - length, count)
    return [[bos_token_id, *text_ids[start : start + length - 1]] for start in starts]


def measure_case(
    servers: Sequence[Running],
    prompts: Sequence[Sequence[Sequence[int]]],
    clients: int,
    new_tokens: int,
) -> dict[str, Any]:
    """Return every server's figures, one per round of ``prompts``, and our ratios to the other.

    The first round warms up, and is dropped.
    """
    found: dict[str, list[dict[str, float]]] = {one.server.name: [] for one in servers}
    for in_round in prompts:
        for one in servers:
            with one.awake():
                load = put_under_load(one.url, in_round, clients, new_tokens, one.server.fields)
            found[one.server.name].append(figures(load))
    rounds = {name: values[1:] for name, values in found.items()}
    case: dict[str, Any] = {"servers": {name: summary(each) for name, each in rounds.items()}}
    ours, *others = rounds.values()
    case["ratios"] = {
        name: ratios(ours, theirs) for name, theirs in zip([*rounds][1:], others, strict=True)
    }
    return case


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return median, minimum and maximum of each figure."""
    return {name: spread([one[name] for one in rounds]) for name in rounds[0]}


def ratios(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Return how many times faster we are in each round: more tokens/s, or shorter times."""
    found = {}
    for title, name in RATIOS.items():
        pairs = [(one[name], other[name]) for one, other in zip(ours, theirs, strict=True)]
        is_time = name.endswith("_ms")
        found[title] = spread([b / a if is_time else a / b for a, b in pairs])
    return found


def case_lines(case: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that are printed of a case."""
    clients = case["clients"]
    yield (
        f"{clients} client{'s' * (clients > 1)}, prompts of {case['prompt_tokens']} tokens, "
        f"{case['new_tokens']} new tokens, {case['requests']} requests per round"
    )
    rows = [["", *(title for title, _ in COLUMNS.values()), "client"]]
    for name, found in case["servers"].items():
        row = [f"{found[figure]['median']:.{digits}f}" for figure, (_, digits) in COLUMNS.items()]
        row[0] = scaled(found["new_tokens_per_s"], 1, 1)
        rows.append([name, *row, f"{found['client_share']['median']:.0%}"])
    yield from aligned(iter(rows))
    for name, found in case["ratios"].items():
        shown = ", ".join(f"{title} {scaled(value, 1, 2)} x" for title, value in found.items())
        yield f"  faster than {name}: {shown}"


def measure(
    bundle: Bundle,
    llama: Path | None,
    cases: Sequence[tuple[int, int]],
    *,
    new_tokens: int,
    requests: int,
    rounds: int,
    threads: int,
    device: str,
) -> dict[str, Any]:
    """Measure and print all cases, and return the report.

    Args:
        bundle: its tokenizer encodes the text that prompts are cut from.
        llama: the folder of llama-server and its model; None measures our server alone.
        cases: clients and prompt tokens of each.
        new_tokens: to generate after each prompt.
        requests: of each client in a round.
        rounds: measured after one that warms up.
        threads: that each server computes with.
        device: ``cpu`` or ``cuda``.

    Raises:
        InputError: an option does not fit the model, or a file is missing.
        Gemma3ExportError: a server failed.
    """
    if sys.platform == "win32":
        raise UnavailableError("idle servers are stopped by signals that Windows does not have")
    text_ids = benchmark_text(bundle, max(length for _, length in cases) + new_tokens)
    versions = {"gemma3-export": __version__, "onnxruntime": import_onnxruntime().__version__}
    if llama is not None:
        versions[PROGRAM] = version_of(llama / PROGRAM)
    found: dict[str, Any] = {
        "machine": describe_machine() | {"device": device, "threads": threads},
        "versions": versions,
        "cases": [],
    }
    machine = found["machine"]
    load = machine["load_average"]
    click.echo(
        f"{Processor(**machine['processor'])}, {machine['processors']} processors, "
        f"{threads} threads, huge pages {machine['huge_pages'] or 'unknown'}, "
        f"load {load:.1f}"
    )
    click.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
    click.echo(f"medians (min to max) of {rounds} rounds")
    for number, (clients, length) in enumerate(cases):
        count = max(LEAST_REQUESTS, clients * requests)
        drawn = draw_prompts(
            text_ids, bundle.config.bos_token_id, length, count * (1 + rounds), seed=number
        )
        limits = Limits(
            clients=clients, request_tokens=length + new_tokens, threads=threads, device=device
        )
        with ExitStack() as stack:
            servers = [
                stack.enter_context(started(one)) for one in servers_for(bundle, llama, limits)
            ]
            in_rounds = [drawn[start : start + count] for start in range(0, len(drawn), count)]
            case = measure_case(servers, in_rounds, clients, new_tokens)
        case = {
            "clients": clients,
            "prompt_tokens": length,
            "new_tokens": new_tokens,
            "requests": count,
            **case,
        }
        found["cases"].append(case)
        click.echo("")
        for line in case_lines(case):
            click.echo(line)
    return found


def benchmark_text(bundle: Bundle, longest: int) -> list[int]:
    """Return the token ids of a long text that every Python installation has.

    Raises:
        InputError: the bundle has no tokenizer, or requests of ``longest`` tokens do not fit.
    """
    if not (bundle.path / TOKENIZER_NAME).exists():
        raise InputError(
            f"{bundle.path} has no tokenizer.json, which encodes the prompts; export it again "
            "with a tokenizer"
        )
    if longest > (limit := bundle.config.max_position_embeddings):
        raise InputError(
            f"the longest prompt and its new tokens are {longest}, more than the model's context "
            f"of {limit}; reduce --prompt-tokens or --new-tokens"
        )
    text = "\n".join(topics.topics.values())[:TEXT_CHARACTERS]
    ids = Tokenizer.from_folder(bundle.path).encode_ordinary(text)
    if longest > len(ids):
        raise InputError(
            f"the longest prompt and its new tokens are {longest}, and the text that prompts are "
            f"cut from has {len(ids)}; reduce --prompt-tokens"
        )
    return ids


def servers_for(bundle: Bundle, llama: Path | None, limits: Limits) -> list[Server]:
    """Return the servers to measure, ours first."""
    found = [our_server(bundle.path, limits)]
    if llama is not None:
        found.append(llama_server(llama / PROGRAM, llama / MODEL, limits))
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@bundle_argument
@click.option(
    "--llama",
    type=click.Path(path_type=Path),
    help="Folder that `python -m benchmarks.serving.llama_server` made; without it, only our "
    "server is measured.",
)
@click.option(
    "--clients",
    type=click.IntRange(1, MAX_CONNECTIONS),
    multiple=True,
    default=(1, 4, 8, 16),
    show_default=True,
)
@click.option(
    "--prompt-tokens", type=click.IntRange(2), multiple=True, default=(128, 512), show_default=True
)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help=f"Requests of each client and round, at least {LEAST_REQUESTS} in all.",
)
@rounds_option
@threads_option
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@report_option
def main(
    bundle_path: Path,
    llama: Path | None,
    clients: tuple[int, ...],
    prompt_tokens: tuple[int, ...],
    new_tokens: int,
    requests: int,
    rounds: int,
    threads: int | None,
    device: str,
    report: Path | None,
) -> None:
    """Measure throughput and latencies of servers under load.

    Both have as many slots as there are clients, and take turns in every round. The last column is
    the share of one processor that the clients themselves take.
    """
    cases = [(count, length) for count in clients for length in prompt_tokens]
    try:
        found = measure(
            Bundle(bundle_path),
            llama,
            cases,
            new_tokens=new_tokens,
            requests=requests,
            rounds=rounds,
            threads=threads or available_processors(),
            device=device,
        )
        write_report(report, found)
    except Gemma3ExportError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
