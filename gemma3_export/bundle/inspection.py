"""Describe a bundle as data: model, graphs, files, origin, parity reports and cache sizes.

This needs neither torch nor ONNX Runtime. Operators are counted if the package ``onnx`` is
installed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemma3_export.bundle.bundle import Bundle
from gemma3_export.bundle.manifest import PARITY, REMEDY, RUNTIMES, Graph, read_manifest
from gemma3_export.bundle.signature import TensorSpec, window_capacity
from gemma3_export.dtypes import ELEMENT_TYPES
from gemma3_export.errors import InputError
from gemma3_export.files import is_file
from gemma3_export.records import Count, read_json, to_record

__all__ = [
    "CONTEXTS",
    "ProofSummary",
    "cache_bytes_per_token",
    "inspect_bundle",
    "parity_line",
    "read_proofs",
    "rounding_line",
    "summarize_proof",
]

CONTEXTS = (2048, 8192, 32768)  # numbers of tokens to report cache sizes for


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return the object that ``gemma3-export inspect --json`` prints.

    It describes all graphs, or those of the variant through which ``bundle`` is seen.

    Raises:
        InputError: a graph or parity report cannot be read.
    """
    config, manifest = bundle.config, bundle.manifest
    return {
        "path": str(bundle.path),
        "format_version": manifest.format_version,
        "model": {"parameters": config.num_parameters, **asdict(config)},
        "graphs": [
            _describe_graph(bundle, graph)
            for graph in manifest.graphs
            if bundle.variant in (None, graph.variant)
        ],
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "source": manifest.source,
        "versions": manifest.versions,
        "proofs": read_proofs(bundle.path),
    }


def _describe_graph(bundle: Bundle, graph: Graph) -> dict[str, Any]:
    per_token = cache_bytes_per_token(bundle, graph)
    limit = bundle.config.max_position_embeddings
    return {
        "runtime": graph.runtime,
        "variant": graph.variant,
        "target": graph.target,
        "dtype": graph.dtype,
        "path": graph.path,
        "windowed_path": graph.windowed_path,
        "screen_bytes": screen_bytes(bundle, graph),
        "verified": graph.verified,
        "min_onnxruntime": graph.min_onnxruntime,
        "calibration": graph.calibration,
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


def rounding_line(calibration: Mapping[str, Any] | None) -> str | None:
    """Say in one line why and how well weights were rounded by Q4_0's rule, None if they were not.

    Args:
        calibration: of a graph in the manifest.
    """
    if not calibration or calibration.get("rounding") != "q4_0":
        return None
    reasons = {
        "requested": "as requested",
        "grid": "on whose grid the weights lie",
        "name": "for which the repository says that it was trained",
    }
    line = f"by the rule of Q4_0, {reasons.get(str(calibration.get('reason')), 'reason unknown')}"
    divergence = calibration.get("divergence")
    if not isinstance(divergence, dict):
        return line
    own, other = divergence.get("q4_0"), divergence.get("gptq")
    if not isinstance(own, float) or not isinstance(other, float):
        return line
    return f"{line}; divergence {own:.3g} nats per token (with GPTQ {other:.3g})"


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


def read_proofs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the parity reports of the bundle at ``folder``, by the graph's relative path.

    Empty if it was never verified.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / PARITY
    if not is_file(path):
        return {}
    data = read_json(path, remedy=REMEDY)
    reports = to_record(data, dict[str, dict[str, Any]], where=str(path), remedy=REMEDY)
    if reports.keys().isdisjoint(RUNTIMES):
        return reports
    # Before format 3, bundles had one graph per runtime, and reports were named after that. Graphs
    # that were added since come later in the manifest.
    paths = {graph.runtime: graph.path for graph in reversed(read_manifest(folder).graphs)}
    return {paths.get(name, name): report for name, report in reports.items()}


@dataclass(kw_only=True)
class _Metric:
    """What a summary needs of a metric; version 1 of the report said floor for noise_floor."""

    name: str
    value: float | None
    noise_floor: float | None = None
    floor: float | None = None

    @property
    def ratio(self) -> float:
        floor = self.noise_floor or self.floor
        return self.value / floor if floor and self.value is not None else 0.0


@dataclass(kw_only=True)
class _Point:
    kld: float | None
    is_same_top1: bool


@dataclass(kw_only=True)
class _Case:
    positions: Count
    metrics: list[_Metric]
    points: list[_Point] = field(default_factory=list)


@dataclass(kw_only=True)
class _Gate:
    name: str
    metrics: list[_Metric] = field(default_factory=list)


@dataclass(kw_only=True)
class _Report:
    passed: bool
    cases: list[_Case]
    gates: list[_Gate] = field(default_factory=list)
    noise_floor_dtype: str = ""
    floor_dtype: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProofSummary:
    """The numbers of a parity report that a reader wants first.

    Attributes:
        passed: the verdict.
        cases: how many ways of feeding tokens were compared.
        positions: how many positions they have in total.
        max_logit_error: the largest absolute error of a logit.
        worst_ratio: the largest error of logits, keys and values, as a multiple of the noise floor.
        noise_floor_dtype: the precision whose rounding is the noise floor.
        same_top1: at how many positions the greedy token is that of the reference.
        quality: distance of quantized weights from full precision by name of the metric:
            ``mean_kld`` in nats per token, ``top1_agreement``, ``perplexity_ratio``. Otherwise the
            three are those of rounding.
    """

    passed: bool
    cases: int
    positions: int
    max_logit_error: float
    worst_ratio: float
    noise_floor_dtype: str
    same_top1: int
    quality: dict[str, float]


def summarize_proof(report: Mapping[str, Any]) -> ProofSummary:
    """Return the most important numbers of a report from ``parity.json``.

    Raises:
        InputError: ``report`` is not a parity report.
    """
    found = to_record(report, _Report, where=f"a report in {PARITY}", remedy=REMEDY, is_part=True)
    metrics = [metric for case in found.cases for metric in case.metrics]
    errors = (item.value or 0.0 for item in metrics if item.name == "logits_max_abs")
    quality = (gate for gate in found.gates if gate.name == "quality")
    return ProofSummary(
        passed=found.passed,
        cases=len(found.cases),
        positions=sum(case.positions for case in found.cases),
        max_logit_error=max(errors, default=0.0),
        worst_ratio=max((item.ratio for item in metrics if "kld" not in item.name), default=0.0),
        noise_floor_dtype=found.noise_floor_dtype or found.floor_dtype,
        same_top1=sum(point.is_same_top1 for case in found.cases for point in case.points),
        quality={
            item.name: item.value
            for gate in quality
            for item in gate.metrics
            if item.value is not None
        },
    )


def parity_line(report: Mapping[str, Any]) -> str:
    """Summarize a report from ``parity.json`` in one line.

    Raises:
        InputError: ``report`` is not a parity report.
    """
    found = summarize_proof(report)
    return (
        f"{'passed' if found.passed else 'FAILED'}; {found.cases} cases, "
        f"{found.positions} positions, largest logit error "
        f"{found.max_logit_error:.2g}, worst error {found.worst_ratio:.2f} x the noise floor of "
        f"{found.noise_floor_dtype}"
    )
