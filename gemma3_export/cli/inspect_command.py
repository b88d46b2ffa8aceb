"""``gemma3-export inspect``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gemma3_export.bundle import Bundle
    from gemma3_export.cuda.placement import PlacementReport

__all__ = [
    "inspect",
    "placement_lines",
]

EPILOG = """\b
Examples:
  gemma3-export inspect gemma-3-270m
  gemma3-export inspect gemma-3-270m --check
  gemma3-export inspect gemma-3-270m --json | python3 -m json.tool
  gemma3-export inspect gemma-3-270m --cuda-placement --cuda-python .venv-cuda/bin/python
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@click.option("--check", is_flag=True, help="Hash every file and compare with the manifest.")
@click.option(
    "--cuda-placement",
    is_flag=True,
    help="Instead: does the ONNX graph run on an NVIDIA GPU from end to end? Needs no GPU.",
)
@click.option(
    "--cuda-python",
    type=click.Path(path_type=Path),
    help="Interpreter that has onnxruntime-gpu, for --cuda-placement (default: this one).",
)
def inspect(
    bundle_path: Path,
    as_json: bool,
    check: bool,
    cuda_placement: bool,
    cuda_python: Path | None,
) -> None:
    """Say what a bundle is: model, graphs, files, where its weights come from, and its proof.

    With --cuda-placement, say where ONNX Runtime puts each node of the ONNX graph, over a stub of
    CUDA; the exit code is 1 when anything but extents stays on the CPU.
    """
    if cuda_python is not None and not cuda_placement:
        raise click.UsageError("--cuda-python is for --cuda-placement; add that, or leave it out")

    from gemma3_export.bundle import Bundle
    from gemma3_export.bundle.inspection import inspect_bundle

    bundle = Bundle(bundle_path)
    if check:
        bundle.check_files()
    else:
        bundle.check_sizes()
    if cuda_placement:
        show_placement(bundle, cuda_python, as_json)
        return
    facts = inspect_bundle(bundle)
    facts["files_checked"] = "sha256" if check else "size"
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(_lines(facts)))


def show_placement(bundle: Bundle, python: Path | None, as_json: bool) -> None:
    """Print the placement of the bundle's ONNX graph; a bad one ends with exit code 1."""
    from gemma3_export.cli.inspect_command import placement_lines
    from gemma3_export.cuda.placement import check_placement

    report = check_placement(bundle, python)
    click.echo(
        json.dumps(report.to_json(), indent=1) if as_json else "\n".join(placement_lines(report))
    )
    if not report.passed:
        click.get_current_context().exit(1)


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{facts['path']}: bundle of format {facts['format_version']}"
    yield from _model_lines(facts["model"])
    for graph in facts["graphs"]:
        yield ""
        yield from _graph_lines(graph)
        yield f"  proof: {_proof_line(graph, facts)}"
    yield ""
    yield from _source_lines(facts["source"])
    yield ""
    yield from _file_lines(facts)
    yield ""
    yield "made with: " + ", ".join(f"{k} {v}" for k, v in sorted(facts["versions"].items()))


def _source_lines(source: Mapping[str, Any]) -> Iterator[str]:
    """Where the weights came from; what the manifest may say besides comes last."""
    rest = dict(source)
    kind, location = rest.pop("kind", "of unknown kind"), rest.pop("location", "an unknown place")
    yield f"weights: {location} ({kind})"
    files = rest.pop("files", None)
    for name, sha256 in files.items() if isinstance(files, dict) else ():
        yield f"  {name}: SHA-256 {sha256}"
    yield from (f"  {key}: {value}" for key, value in rest.items())


def _model_lines(model: Mapping[str, Any]) -> Iterator[str]:
    sliding = sum(kind == "sliding_attention" for kind in model["layer_types"])
    layers = model["num_hidden_layers"]
    yield (
        f"model: {model['parameters']:,} parameters, {layers} layers "
        f"({sliding} sliding with window {model['sliding_window']}, {layers - sliding} full)"
    )
    yield (
        f"  hidden {model['hidden_size']}, feed-forward {model['intermediate_size']}, "
        f"{model['num_attention_heads']} query heads, {model['num_key_value_heads']} "
        f"key-value heads of {model['head_dim']}, vocabulary {model['vocab_size']:,}, "
        f"context {model['max_position_embeddings']:,}"
    )


def _graph_lines(graph: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"graph {graph['path']}: runtime {graph['runtime']}, target {graph['target']}, "
        f"weights {graph['dtype']}, cache {graph['cache_dtype']}"
    )
    if graph["operators"] is None:
        yield f"  operators not counted: {graph['operators_missing']}"
    else:
        opsets = ", ".join(f"{domain} {version}" for domain, version in graph["opsets"].items())
        total = sum(graph["operators"].values())
        counts = ", ".join(f"{name} {count}" for name, count in graph["operators"].items())
        yield f"  opsets: {opsets}"
        yield f"  {total} nodes: {counts}"
    yield f"  cache: {graph['cache_bytes_per_token']:,} bytes a token" + "".join(
        f"; {int(tokens):,} tokens {size / 1e6:,.1f} MB"
        for tokens, size in graph["cache_bytes"].items()
    )
    if graph["windowed_path"]:
        sizes = (
            f"{int(tokens):,} tokens {size / 1e6:,.1f} MB"
            for tokens, size in graph["windowed_cache_bytes"].items()
        )
        yield f"  windowed cache ({graph['windowed_path']}): {'; '.join(sizes)}"
    if graph["screen_bytes"]:
        yield f"  screened head: {graph['screen_bytes'] / 1e6:,.1f} MB more, read before the head"
    for kind in ("inputs", "outputs"):
        yield f"  {kind}:"
        yield from _signature_lines(graph["signature"][kind])


def _signature_lines(specs: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each tensor, and one for all layers' keys or values."""
    cache = [spec for spec in specs if len(spec["axes"]) == 4]
    for spec in specs:
        if spec in cache[2:]:
            continue
        axes = ", ".join(map(str, spec["axes"]))
        name = spec["name"]
        if spec in cache and len(cache) > 2:
            name += f" ... {cache[-2 + cache.index(spec)]['name']}"
        optional = " (optional)" if spec.get("optional") else ""
        yield f"    {name}: {spec['dtype']} [{axes}]{optional}"


def _proof_line(graph: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    from gemma3_export.bundle.inspection import parity_line

    if not graph["verified"]:
        command = f"gemma3-export verify {facts['path']} --runtime {graph['runtime']}"
        return f"NONE; the parity check was skipped. To run it: {command}"
    return parity_line(facts["proofs"].get(graph["runtime"], {}))


def _file_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    checked = "SHA-256 checked" if facts["files_checked"] == "sha256" else "sizes checked"
    yield f"files: {facts['size_bytes']:,} bytes in all, {checked}"
    for name, record in facts["files"].items():
        yield f"  {record['size_bytes']:>15,}  {record['sha256'][:16]}...  {name}"


# A placement report as lines for people.


def placement_lines(report: PlacementReport) -> Iterator[str]:
    """What is where, what is copied, and the verdict."""
    yield f"{report.graph}: onnxruntime-gpu {report.onnxruntime} over a stub of CUDA (an H100)"
    for provider, counts in report.operators.items():
        listed = ", ".join(f"{operator} {count}" for operator, count in counts.items())
        yield f"  {provider}: {sum(counts.values())} nodes: {listed}"
    yield f"  copies between CPU and GPU in every step: {len(report.memory_copies)}"
    yield f"  CUDA graph: {'can be captured' if report.is_capturable else 'cannot be captured'}"
    for problem in report.problems:
        yield f"  problem: {problem}"
    yield f"placement: {'passed' if report.passed else 'FAILED'}"
