"""Define the report as plain frozen data, and its JSON form (see ``report.schema.json``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from gemma3_export.config import Gemma3Config
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.records import to_record

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
    "ModelSummary",
    "ParityReport",
    "PointResult",
    "TensorRange",
]

SCHEMA_ID = "urn:gemma3-export:parity-report"
SCHEMA_VERSION = 2  # version 1 said "floor" instead of "noise_floor"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One measured number and its limit.

    ``noise_floor`` is the same number measured on the reference's own rounding; None if the metric
    has no noise floor.
    """

    name: str
    value: float
    limit: float
    passed: bool
    noise_floor: float | None = None
    is_minimum: bool = False  # the value must be at least the limit
    where: str = ""  # the layer or position with the worst value

    @property
    def ratio(self) -> float | None:
        """Return the value as a multiple of the noise floor, or None without a positive floor."""
        return self.value / self.noise_floor if self.noise_floor else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PointResult:
    """The comparison of the logits at one position."""

    sequence: str
    position: int
    step: int
    max_abs: float
    noise_floor: float
    kld: float
    is_same_top1: bool
    is_tie: bool  # the margin between the expected top two logits is within the tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """The largest error of one layer's keys or values in a case."""

    layer: int
    kind: str  # "key" or "value"
    max_abs: float
    rms: float
    noise_floor: float
    noise_floor_rms: float
    limit: float
    limit_rms: float
    passed: bool
    first_bad_position: int | None = None

    @property
    def share_of_limit(self) -> float:
        """The largest error relative to its limit; 0 of 0 is 0, as in a pruned layer."""
        return share(self.max_abs, self.limit)

    @property
    def rms_share_of_limit(self) -> float:
        """The RMS error relative to its limit."""
        return share(self.rms, self.limit_rms)


def share(value: float, limit: float) -> float:
    """Return ``value`` relative to ``limit``, of which either may be 0."""
    if limit:
        return value / limit
    return math.inf if value else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """The verdict of one case."""

    name: str
    title: str
    is_text: bool
    passed: bool
    positions: int  # number of compared positions
    steps: int
    metrics: tuple[MetricResult, ...]
    flips: int  # greedy tokens that differ by more than the tolerance
    ties: int  # greedy tokens that differ within the tolerance
    points: tuple[PointResult, ...]
    layers: tuple[LayerResult, ...]

    @property
    def label(self) -> str:
        """Return the text that identifies the case in a table."""
        return self.title if self.is_text else self.name

    @property
    def top1_matches(self) -> int:
        """Return the number of positions with the expected greedy token."""
        return sum(point.is_same_top1 for point in self.points)

    def metric(self, name: str) -> MetricResult | None:
        """Return the metric called ``name``, or None if this case does not have it."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def worst_ratio(self, *names: str) -> float | None:
        """Return the largest multiple of the noise floor among the metrics called ``names``.

        Without names, consider all metrics except the KL divergence, which is quadratic in the
        error.
        """
        ratios = [
            metric.ratio
            for metric in self.metrics
            if metric.ratio is not None
            and (metric.name in names if names else metric.name != "logits_mean_kld")
        ]
        return max(ratios, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """The verdict of gate A (implementation), gate B (quality), or the half-precision range."""

    name: str
    question: str  # the question that the gate answers
    passed: bool
    metrics: tuple[MetricResult, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first place where a failing runtime departs from the reference."""

    case: str
    step: int
    sequence: str
    position: int
    layer: int | None  # None: before the first layer or after the last
    block: str
    explanation: str
    needs_past: bool  # correct without a cached past, wrong with one

    @property
    def place(self) -> str:
        """Return ``layer 7``, or ``outside the layers``."""
        return "outside the layers" if self.layer is None else f"layer {self.layer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """The largest absolute value of one kind of tensor over all calibration tokens."""

    kind: str  # the reference module that outputs it, or a name such as ``mlp.product``
    layer: int | None  # None outside the layers
    max_abs: float
    share: float  # of the dtype's largest finite value
    sequence: str  # where the largest value occurred
    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRange:
    """The range of one stored weight."""

    name: str
    max_abs: float
    share: float  # of the dtype's largest finite value
    rounding: float  # RMS error of rounding to the dtype, relative to the RMS of the weight


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfRanges:
    """Ranges of the tensors that a graph holds in a 16-bit dtype, against the dtype's limits."""

    dtype: str
    largest: float  # largest finite value of the dtype
    tokens: int  # number of calibration tokens
    tensors: tuple[TensorRange, ...]
    weights: tuple[MatrixRange, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """The shape of the checked model."""

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[str, ...]
    num_parameters: int

    @classmethod
    def of(cls, config: Gemma3Config) -> ModelSummary:
        """Summarize a config."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """The complete result of one parity check."""

    candidate: dict[str, Any]  # the runtime's description of itself
    baseline: dict[str, Any]
    model: ModelSummary
    source: dict[str, Any]
    files: dict[str, str]  # SHA-256 of the bundle's files
    options: VerifyOptions
    versions: dict[str, str]
    noise_floor_dtype: str
    gates: tuple[GateResult, ...]
    cases: tuple[CaseResult, ...]
    divergence: Divergence | None
    created: str  # UTC, ISO 8601
    ranges: HalfRanges | None = None  # only for graphs in half precision
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ParityReport:
        """Return the report whose published form is ``data``, as ``parity.json`` holds it.

        Raises:
            InputError: it is damaged, of an earlier version, or has numbers that are not finite.
        """
        return to_record(
            data, cls, where="a parity report", remedy="verify the bundle again", is_part=True
        )

    @property
    def passed(self) -> bool:
        """Return True if every gate passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def positions(self) -> int:
        """Return the number of compared positions."""
        return sum(case.positions for case in self.cases)

    @property
    def ties(self) -> int:
        """Return the number of greedy tokens that differ within the tolerance."""
        return sum(case.ties for case in self.cases)

    @property
    def worst_ratio(self) -> float:
        """Return the largest error of all cases as a multiple of the noise floor."""
        ratios = (case.worst_ratio() for case in self.cases)
        return max((ratio for ratio in ratios if ratio), default=0.0)

    def to_json(self) -> str:
        """Return the published JSON form; non-finite numbers become null."""
        data = {"schema": SCHEMA_ID, "schema_version": SCHEMA_VERSION, "passed": self.passed}
        return json.dumps(data | plain(self), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Return dataclasses as dictionaries, floats with eight digits, and non-finite ones as None."""
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
