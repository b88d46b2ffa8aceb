"""Measure the range of the values that a graph holds in half precision.

float16 ends at 65504. Larger values silently become infinite, perhaps only with text that appears
later. The reference therefore runs over calibration text in float32, and the largest value of each
kind of tensor in each layer is compared with the dtype's range. The reference is read one layer at
a time, so peak memory depends on the largest layer, as in an export without a parity check.

Tensors that are not listed cannot exceed those that are: GELU shrinks values, a split copies them,
and a rotation enlarges them by a factor of sqrt(2) at most.

Shapes: B batch rows (1), T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemma3_export.config import EMBEDDING, Gemma3Config
from gemma3_export.errors import ParityError
from gemma3_export.parity.intermediates import ATTEND, ROTARY_KEY
from gemma3_export.parity.options import HalfPrecision, VerifyOptions
from gemma3_export.parity.report.model import (
    GateResult,
    HalfRanges,
    MatrixRange,
    MetricResult,
    TensorRange,
)
from gemma3_export.parity.sequences import TokenSequence, held_out_sequences, sequences_for
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import LayerwiseForward
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.tokenizer import Tokenizer

__all__ = ["calibration_sequences", "measure_ranges", "range_gate", "require_range"]

CALIBRATION_TOKENS = 256  # of each sequence
RANGE_LIMIT = 0.25  # of the dtype's largest value; other text may reach higher values
ROUNDING_LIMIT = torch.finfo(torch.bfloat16).eps / 2  # beyond this, bfloat16 rounds a matrix better
OUTPUTS = (
    "input_layernorm",  # input of the first products
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.o_proj",
    "pre_feedforward_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
INPUTS = {"self_attn.o_proj": ATTEND, "mlp.down_proj": "mlp.product"}
RESIDUAL = "residual"
RESIDUAL_OUTPUTS = ("post_attention_layernorm", "post_feedforward_layernorm")


def calibration_sequences(config: Gemma3Config, tokenizer: Tokenizer | None) -> list[TokenSequence]:
    """Return the parity check's prompts and held-out text; without a tokenizer, random ids."""
    sequences = sequences_for(config, VerifyOptions(), tokenizer)
    if tokenizer is not None:
        sequences += held_out_sequences(tokenizer, config.max_position_embeddings)
    return [replace(item, ids=item.ids[:CALIBRATION_TOKENS]) for item in sequences]


@torch.inference_mode()
def measure_ranges(
    source: WeightSource,
    sequences: Sequence[TokenSequence],
    half: HalfPrecision,
    progress: Progress,
) -> HalfRanges:
    """Run the reference over ``sequences`` and record what a graph would hold in half precision.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """
    meter = RangeMeter(half)
    config = source.config
    batches = [torch.from_numpy(sequence.ids)[None] for sequence in sequences]
    stage = "measuring the activation range"
    tokens = sum(len(sequence.ids) for sequence in sequences)
    done, total = 0, tokens * (config.num_hidden_layers + 1)  # the head counts as a layer
    forward = LayerwiseForward(source, batches)
    for index, layer in forward.layers():
        meter.layer = index
        meter.attach(layer)
        for row, sequence in enumerate(sequences):
            progress(stage, done, total)
            meter.sequence = sequence.name
            states, (key, _) = forward.step(row)
            meter.record(ROTARY_KEY, key[0].transpose(0, 1))
            meter.record_residual(states)
            done += len(sequence.ids)
        for name, parameter in layer.named_parameters():
            meter.record_weight(f"model.layers.{index}.{name}", parameter)
    progress(stage, done, total)
    meter.layer = None
    norm = forward.final_norm()
    measure_head(source, [norm(states)[0] for states in forward.states], sequences, meter)
    progress(stage, total, total)
    return HalfRanges(
        dtype=str(half.dtype).removeprefix("torch."),
        largest=meter.largest,
        tokens=tokens,
        tensors=tuple(meter.tensors.values()),
        weights=tuple(meter.weights),
    )


def measure_head(
    source: WeightSource,
    normed: Sequence[Tensor],
    sequences: Sequence[TokenSequence],
    meter: RangeMeter,
) -> None:
    """Measure the input and output of the head, reading its matrix in chunks."""
    largest = [torch.zeros(len(x), 1) for x in normed]
    head = source.config.head_name
    for name in dict.fromkeys((EMBEDDING, head)):
        parts = []
        for chunk in source.chunks(name):
            check_finite(name, chunk)
            weight = chunk.float()
            parts.append(moments(weight, meter.half.dtype))
            if name == head:
                for known, x in zip(largest, normed, strict=True):
                    torch.maximum(known, (x @ weight.T).abs().amax(1, keepdim=True), out=known)
        meter.record_moments(name, parts)
    for sequence, x, logits in zip(sequences, normed, largest, strict=True):
        meter.sequence = sequence.name
        meter.record("norm", x)
        meter.record("head", logits)


class RangeMeter:
    """The largest value of each kind of tensor in each layer so far."""

    def __init__(self, half: HalfPrecision) -> None:
        self.half = half
        self.largest = float(torch.finfo(half.dtype).max)
        self.layer: int | None = None
        self.sequence = ""
        self.tensors: dict[tuple[int | None, str], TensorRange] = {}
        self.weights: list[MatrixRange] = []

    def attach(self, layer: nn.Module) -> None:
        """Add hooks that record the inputs and outputs of the parts of ``layer``."""
        outputs = OUTPUTS + (RESIDUAL_OUTPUTS if self.half.holds_residual else ())
        for name in outputs:
            module = layer.get_submodule(name)
            module.register_forward_hook(partial(self._record_output, name))
        for name, kind in INPUTS.items():
            module = layer.get_submodule(name)
            module.register_forward_pre_hook(partial(self._record_input, kind))
        if self.half.holds_residual:  # between attention and feed-forward
            module = layer.get_submodule("pre_feedforward_layernorm")
            module.register_forward_pre_hook(partial(self._record_input, RESIDUAL))

    def _record_output(self, kind: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        del module, inputs
        self.record(kind, output[0])

    def _record_input(self, kind: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        del module
        self.record(kind, inputs[0][0])

    def record_residual(self, x: Tensor) -> None:
        """Record a layer's output [1, T, D]."""
        if self.half.holds_residual:
            self.record(RESIDUAL, x[0])

    def record(self, kind: str, x: Tensor) -> None:
        """Record a tensor [T, ...] of the current layer and sequence."""
        by_token = x.flatten(1).abs().amax(1)
        position = int(by_token.argmax())
        value = float(by_token[position])
        known = self.tensors.get((self.layer, kind))
        if known is None or value > known.max_abs:
            self.tensors[self.layer, kind] = TensorRange(
                kind=kind,
                layer=self.layer,
                max_abs=value,
                share=value / self.largest,
                sequence=self.sequence,
                position=position,
            )

    def record_weight(self, name: str, weight: Tensor) -> None:
        """Record a weight, unless the graph holds it in another dtype."""
        if weight.ndim > 1 or self.half.holds_residual:
            self.record_moments(name, [moments(weight, self.half.dtype)])

    def record_moments(self, name: str, parts: Sequence[tuple[float, float, float]]) -> None:
        """Record a weight from the moments of its chunks."""
        if self.half.holds_matrices:
            largest = max(part[0] for part in parts)
            square, lost = (sum(part[index] for part in parts) for index in (1, 2))
            self.weights.append(
                MatrixRange(
                    name=name,
                    max_abs=largest,
                    share=largest / self.largest,
                    rounding=math.sqrt(lost / square) if square else 0.0,
                )
            )


def moments(weight: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the largest absolute value, the sum of squares, and the squared rounding error."""
    lost = (weight.to(dtype).float() - weight).nan_to_num(posinf=0.0, neginf=0.0)
    return (
        float(weight.abs().max()),
        float(weight.double().square().sum()),
        float(lost.double().square().sum()),
    )


def range_gate(ranges: HalfRanges) -> GateResult:
    """Judge whether everything fits into the dtype, with room for other text."""
    tensor = max(ranges.tensors, key=lambda item: item.share)
    metrics = [
        MetricResult(
            name="largest_activation",
            value=tensor.share,
            limit=RANGE_LIMIT,
            passed=tensor.share <= RANGE_LIMIT,
            where=f"{place(tensor)}: {tensor.max_abs:,.1f} of {ranges.largest:.5g}",
        )
    ]
    if ranges.weights:
        weight = max(ranges.weights, key=lambda item: item.share)
        lossy = max(ranges.weights, key=lambda item: item.rounding)
        metrics += [
            MetricResult(
                name="largest_weight",
                value=weight.share,
                limit=1.0,
                passed=weight.share <= 1.0,
                where=f"{weight.name}: {weight.max_abs:.4g} of {ranges.largest:.5g}",
            ),
            MetricResult(
                name="weight_rounding",
                value=lossy.rounding,
                limit=ROUNDING_LIMIT,
                passed=lossy.rounding <= ROUNDING_LIMIT,
                where=lossy.name,
            ),
        ]
    return GateResult(
        name="range",
        question=f"Does everything that the graph holds in {ranges.dtype} fit, with headroom?",
        passed=all(metric.passed for metric in metrics),
        metrics=tuple(metrics),
    )


def place(tensor: TensorRange) -> str:
    """Return a phrase such as ``mlp.product in layer 7``."""
    return tensor.kind if tensor.layer is None else f"{tensor.kind} in layer {tensor.layer}"


def require_range(ranges: HalfRanges) -> None:
    """Refuse a dtype whose range is too small.

    Raises:
        ParityError: a value is too large; the message names the tensor, the layer and the value.
    """
    gate = range_gate(ranges)
    if gate.passed:
        return
    found = "; ".join(
        f"{metric.name} is {metric.value:.3g} with a limit of {metric.limit:.3g} ({metric.where})"
        for metric in gate.metrics
        if not metric.passed
    )
    option = "--dtype" if ranges.weights else "--activations"  # quantized matrices
    raise ParityError(
        f"{ranges.dtype} cannot hold this model: as fractions of the dtype's largest value, over "
        f"{ranges.tokens} tokens, {found}. No bundle was written. Export with {option} bf16, which "
        "has the range of fp32"
    )
