"""Describe a bundle as data: model, graphs, files, origin, parity reports and cache sizes.

This needs neither torch nor ONNX Runtime. Operators are counted if the package ``onnx`` is
installed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gemma3_export.bundle.bundle import Bundle
from gemma3_export.bundle.manifest import PARITY, Graph
from gemma3_export.bundle.signature import TensorSpec, window_capacity
from gemma3_export.dtypes import ELEMENT_TYPES
from gemma3_export.errors import InputError

__all__ = ["CONTEXTS", "cache_bytes_per_token", "inspect_bundle", "parity_line", "read_proofs"]

CONTEXTS = (2048, 8192, 32768)  # numbers of tokens to report cache sizes for


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return the object that ``gemma3-export inspect --json`` prints.

    Raises:
        InputError: a graph or parity report cannot be read.
    """
    config, manifest = bundle.config, bundle.manifest
    return {
        "path": str(bundle.path),
        "format_version": manifest.format_version,
        "model": {"parameters": config.num_parameters, **asdict(config)},
        "graphs": [_describe_graph(bundle, graph) for graph in manifest.graphs],
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "source": manifest.source,
        "versions": manifest.versions,
        "proofs": read_proofs(bundle),
    }


def _describe_graph(bundle: Bundle, graph: Graph) -> dict[str, Any]:
    per_token = cache_bytes_per_token(bundle, graph)
    limit = bundle.config.max_position_embeddings
    return {
        "runtime": graph.runtime,
        "target": graph.target,
        "dtype": graph.dtype,
        "path": graph.path,
        "windowed_path": graph.windowed_path,
        "screen_bytes": screen_bytes(bundle, graph),
        "verified": graph.verified,
        "cache_dtype": graph.cache_dtype,
        "cache_bytes_per_token": per_token,
        "cache_bytes": {str(n): per_token * n for n in CONTEXTS if n <= limit},
        "windowed_cache_bytes": {
            str(n): windowed_cache_bytes(bundle, graph, n) for n in CONTEXTS if n <= limit
        }
        if graph.windowed_path
        else {},
        "signature": bundle.signature(graph).to_json(),
        **_operators(bundle, graph),
    }


def screen_bytes(bundle: Bundle, graph: Graph) -> int | None:
    """Return the size of the head's 8-bit copy, None if there is none."""
    if not graph.is_screened:
        return None
    return bundle.manifest.files[f"{graph.windowed_path}_data"].size_bytes


def cache_bytes_per_token(bundle: Bundle, graph: Graph) -> int:
    """Return the size of keys and values per token of one row."""
    return sum(map(_bytes_per_token, bundle.signature(graph).past))


def windowed_cache_bytes(bundle: Bundle, graph: Graph, tokens: int) -> int:
    """Return the size of one row's cache if sliding layers keep only their window."""
    capacity = window_capacity(bundle.config)
    return sum(
        _bytes_per_token(spec) * (capacity if bundle.config.is_sliding(index // 2) else tokens)
        for index, spec in enumerate(bundle.signature(graph).past)
    )


def _bytes_per_token(spec: TensorSpec) -> int:
    literal = math.prod(axis for axis in spec.axes if isinstance(axis, int))
    return literal * ELEMENT_TYPES[spec.dtype].size_bytes


def _operators(bundle: Bundle, graph: Graph) -> dict[str, Any]:
    """Return opsets and node counts by operator; None, with a reason, if unavailable."""
    if graph.runtime != "onnx":
        return {"opsets": None, "operators": None, "operators_missing": "no ONNX graph"}
    try:
        import onnx
    except ImportError:
        return {"opsets": None, "operators": None, "operators_missing": "onnx is not installed"}
    path = bundle.file(graph.path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has no common error type
        raise InputError(
            f"{path} cannot be read: {error!r:.200}; export the bundle again"
        ) from error
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
    )
    return {
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "operators": dict(counts.most_common()),
    }


def read_proofs(bundle: Bundle) -> dict[str, Any]:
    """Return the bundle's parity reports by runtime; empty if it was never verified.

    Raises:
        InputError: the file is damaged.
    """
    path = bundle.file(PARITY)
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; export the bundle again") from error
    if not isinstance(data, dict) or not all(isinstance(v, dict) for v in data.values()):
        raise InputError(
            f"{path} is damaged: it is not an object of reports; export the bundle again"
        )
    return data


def parity_line(report: Mapping[str, Any]) -> str:
    """Summarize a report from ``parity.json`` in one line.

    Raises:
        InputError: ``report`` is not a parity report.
    """
    try:
        return _parity_line(report)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{PARITY} has no valid report of this graph ({error!r:.200}); export the bundle again"
        ) from error


def _parity_line(report: Mapping[str, Any]) -> str:
    floor = "noise_floor" if report.get("schema_version", 1) >= 2 else "floor"
    cases = report.get("cases", [])
    positions = sum(case["positions"] for case in cases)
    worst = max(
        (
            metric["value"] / metric[floor]
            for case in cases
            for metric in case["metrics"]
            if metric[floor] and metric["value"] is not None and "kld" not in metric["name"]
        ),
        default=0.0,
    )
    error = max(
        (
            metric["value"]
            for case in cases
            for metric in case["metrics"]
            if metric["name"] == "logits_max_abs" and metric["value"] is not None
        ),
        default=0.0,
    )
    verdict = "passed" if report.get("passed") else "FAILED"
    return (
        f"{verdict}; {len(cases)} cases, {positions} positions, largest logit error "
        f"{error:.2g}, worst error {worst:.2f} x the noise floor of {report[f'{floor}_dtype']}"
    )
