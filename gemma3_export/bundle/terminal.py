"""Print the inspection of a bundle to a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma3_export.bundle.inspection import parity_line, rounding_line

__all__ = ["bundle_lines"]


def bundle_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what ``gemma3-export inspect`` prints.

    Args:
        facts: from :func:`gemma3_export.bundle.inspection.inspect_bundle`, and ``files_checked``.
    """
    yield f"{facts['path']}: bundle of format {facts['format_version']}"
    yield from model_lines(facts["model"])
    for graph in facts["graphs"]:
        yield ""
        yield from graph_lines(graph)
        yield f"  proof: {proof_line(graph, facts)}"
    yield ""
    yield from source_lines(facts["source"])
    yield ""
    yield from file_lines(facts)
    yield ""
    yield "made with: " + ", ".join(f"{k} {v}" for k, v in sorted(facts["versions"].items()))


def source_lines(source: Mapping[str, Any]) -> Iterator[str]:
    """Describe where the weights came from, with unknown facts of the manifest last."""
    rest = dict(source)
    kind, location = rest.pop("kind", "unknown kind"), rest.pop("location", "unknown location")
    yield f"weights: {location} ({kind})"
    files = rest.pop("files", None)
    for name, sha256 in files.items() if isinstance(files, dict) else ():
        yield f"  {name}: SHA-256 {sha256}"
    for key, value in rest.items():  # what an adapter or a reduced vocabulary changed
        nested = value.items() if isinstance(value, Mapping) else ()
        yield f"  {key}: " + (", ".join(f"{name} {item}" for name, item in nested) or str(value))


def model_lines(model: Mapping[str, Any]) -> Iterator[str]:
    """Describe the model's size and shape."""
    sliding = sum(kind == "sliding_attention" for kind in model["layer_types"])
    layers = model["num_hidden_layers"]
    yield (
        f"model: {model['parameters']:,} parameters, {layers} layers "
        f"({sliding} sliding with window {model['sliding_window']}, {layers - sliding} full)"
    )
    yield (
        f"  hidden {model['hidden_size']}, feed-forward {model['intermediate_size']}, "
        f"{model['num_attention_heads']} query and {model['num_key_value_heads']} "
        f"key-value heads of size {model['head_dim']}, vocabulary {model['vocab_size']:,}, "
        f"context {model['max_position_embeddings']:,}"
    )


def graph_lines(graph: Mapping[str, Any]) -> Iterator[str]:
    """Describe one graph: operators, cache, inputs and outputs."""
    yield (
        f"graph {graph['path']}: runtime {graph['runtime']}, target {graph['target']}, "
        f"weights {graph['dtype']}, cache {graph['cache_dtype']}"
    )
    if rounding := rounding_line(graph["calibration"]):
        yield f"  rounded: {rounding}"
    if graph["operators"] is None:
        yield f"  operators not counted: {graph['operators_missing']}"
    else:
        opsets = ", ".join(f"{domain} {version}" for domain, version in graph["opsets"].items())
        total = sum(graph["operators"].values())
        counts = ", ".join(f"{name} {count}" for name, count in graph["operators"].items())
        yield f"  opsets: {opsets}" + (
            f"; ONNX Runtime {graph['min_onnxruntime']} or newer"
            if graph["min_onnxruntime"]
            else ""
        )
        yield f"  {total} nodes: {counts}"
    yield f"  cache: {graph['cache_bytes_per_token']:,} bytes per token" + "".join(
        f"; {int(tokens):,} tokens {size / 1e6:,.1f} MB"
        for tokens, size in graph["cache_bytes"].items()
    )
    if graph["windowed_path"]:
        yield f"  sliding-window cache ({graph['windowed_path']})" + "".join(
            f"; {int(tokens):,} tokens {size / 1e6:,.1f} MB"
            for tokens, size in graph["windowed_cache_bytes"].items()
        )
    if graph["screen_bytes"]:
        size = graph["screen_bytes"] / 1e6
        yield f"  screened head: {size:,.1f} MB more, read before the full head"
    for kind in ("inputs", "outputs"):
        yield f"  {kind}:"
        yield from signature_lines(graph["signature"][kind])


def signature_lines(specs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield one line per tensor, and one for the keys or values of all layers."""
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


def proof_line(graph: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Summarize the graph's parity check, or give the command that runs it."""
    if not graph["verified"]:
        command = (
            f"gemma3-export verify {facts['path']} --runtime {graph['runtime']} "
            f"--variant {graph['variant']}"
        )
        return f"NONE; the parity check was skipped. Run it with: {command}"
    return parity_line(facts["proofs"].get(graph["path"], {}))


def file_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """List the files with size and hash."""
    checked = "SHA-256 checked" if facts["files_checked"] == "sha256" else "checked by sample"
    yield f"files: {facts['size_bytes']:,} bytes in total, {checked}"
    for name, record in facts["files"].items():
        yield f"  {record['size_bytes']:>15,}  {record['sha256'][:16]}...  {name}"
