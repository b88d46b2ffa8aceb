"""The report: plain frozen data, and its JSON form (``report.schema.json`` describes it)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

__all__ = [
    "SCHEMA_ID",
    "SCHEMA_VERSION",
    "CaseResult",
    "Divergence",
    "GateResult",
    "HalfRanges",
    "LayerResult",
    "MatrixRange",
    "MetricResult",
    "ParityReport",
    "PointResult",
    "TensorRange",
]

SCHEMA_ID = "urn:gemma3-export:parity-report"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One measured number against its limit.

    ``floor`` is what the reference's own rounding gives for the same number; None where a metric
    has none.
    """

    name: str
    value: float
    limit: float
    passed: bool
    floor: float | None = None
    is_minimum: bool = False  # the limit is a least value
    where: str = ""  # the layer or position that decided

    @property
    def ratio(self) -> float | None:
        """How many times the floor, if there is one above zero."""
        return self.value / self.floor if self.floor else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PointResult:
    """Logits at one position."""

    sequence: str
    position: int
    step: int
    max_abs: float
    floor: float
    kld: float
    is_same_top1: bool
    is_tie: bool  # the truth's two best lie closer than the tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """Largest error of one layer's keys or values over a case."""

    layer: int
    kind: str  # key or value
    max_abs: float
    rms: float
    floor: float
    floor_rms: float
    limit: float
    limit_rms: float
    passed: bool
    first_bad_position: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """One case's verdict."""

    name: str
    title: str
    is_text: bool
    passed: bool
    positions: int  # compared
    steps: int
    metrics: tuple[MetricResult, ...]
    flips: int  # greedy choices that differ beyond the tolerance
    ties: int  # greedy choices that differ within it
    points: tuple[PointResult, ...]
    layers: tuple[LayerResult, ...]

    def metric(self, name: str) -> MetricResult | None:
        """The metric called ``name``, if this case has it."""
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """Gate A (implementation), B (quality), or range for graphs in half precision."""

    name: str
    question: str  # that the gate answers
    passed: bool
    metrics: tuple[MetricResult, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Where a failing runtime first leaves the reference."""

    case: str
    step: int
    sequence: str
    position: int
    layer: int | None  # None: before the first layer or after the last
    block: str
    explanation: str
    needs_past: bool  # right without a cache, wrong with one


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """The largest number in one kind of tensor over all calibration tokens."""

    kind: str  # the reference's module that gives it, or ``mlp.product`` and the like
    layer: int | None  # None outside the layers
    max_abs: float
    share: float  # of the type's largest number
    sequence: str  # where it was seen
    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRange:
    """One stored weight."""

    name: str
    max_abs: float
    share: float  # of the type's largest number
    rounding: float  # rms error of rounding to the type, relative to the rms


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfRanges:
    """How near everything that a graph holds in a 16-bit type comes to the type's ends."""

    dtype: str
    largest: float  # number of the type
    tokens: int  # that were run through the reference
    tensors: tuple[TensorRange, ...]
    weights: tuple[MatrixRange, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """Everything that one check found."""

    candidate: dict[str, object]  # as the runtime describes itself
    baseline: dict[str, object]
    model: dict[str, object]
    source: dict[str, object]
    files: dict[str, str]  # SHA-256 of the bundle's files
    options: dict[str, object]
    versions: dict[str, str]
    floor_dtype: str
    gates: tuple[GateResult, ...]
    cases: tuple[CaseResult, ...]
    divergence: Divergence | None
    created: str  # UTC, ISO 8601
    ranges: HalfRanges | None = None  # of a graph in half precision
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> str:
        """The published form."""
        data = {"schema": SCHEMA_ID, "schema_version": SCHEMA_VERSION, "passed": self.passed}
        return json.dumps(data | plain(self), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses as objects; numbers that JSON does not have as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return str(value)
