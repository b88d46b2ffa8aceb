"""Choose a block format for every matrix by its sensitivity: ``--dtype mixed``.

Sensitivity is the divergence that quantizing one matrix group causes while all other weights stay
in full precision. For small errors divergence is quadratic, so the divergence of another format
follows from the squared error of the group's outputs, and divergences of groups approximately add
up.

Shapes: R sequences, T tokens, P compared positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from gemma3_export.bundle import BlockFormat
from gemma3_export.config import EMBEDDING, HEAD, Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.exporters.quantize.calibration import CalibrationData
from gemma3_export.exporters.quantize.gptq import Hessian
from gemma3_export.exporters.quantize.gptq_quantizer import GptqMatrices, GptqQuantizer
from gemma3_export.exporters.quantize.layerwise import MATRIX_GROUPS
from gemma3_export.exporters.quantize.quantizers import matrix_names
from gemma3_export.parity.rounding import ActivationRounding
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3, KeyValue, LayerContext
from gemma3_export.reference.weights import WeightSource
from gemma3_export.reference.weights.block_matrix import BlockMatrix, quantize

__all__ = [
    "HELD_OUT_SEQUENCES",
    "DivergenceMeter",
    "FormatOption",
    "candidate_formats",
    "choose_formats",
    "measure_quantized",
    "quantize_mixed",
]

MatrixGroup = tuple[str, ...]  # canonical names of matrices that share a format

HELD_OUT_SEQUENCES = 8  # measure divergence; GPTQ does not see them
MAX_ROUNDS = 4
BUDGET_SHARE = 0.8  # leaves room for text that diverges more than the calibration text
MAX_ERROR_ROWS = 4096  # rows of a large matrix to estimate output errors from
POSITION_STRIDE = 5  # compare every fifth position: the head dominates the cost


def quantize_mixed(
    source: WeightSource,
    text: CalibrationData,
    block_size: int,
    max_kld: float,
    folder: Path,
    progress: Progress,
) -> GptqMatrices:
    """Quantize every matrix within a divergence budget, the least sensitive matrices most.

    This holds the model in memory twice, unlike quantizing to one format.

    Args:
        source: canonical weights.
        text: the last sequences measure divergence, the others calibrate.
        block_size: the smallest block size.
        max_kld: the budget, in mean nats per token.
        folder: an empty folder for the quantized matrices.
        progress: receives the stage and its steps.

    Raises:
        InputError: no choice of formats is within the budget, or a matrix is not a multiple of the
            block size.
    """
    calibration = CalibrationData(ids=text.ids[:-HELD_OUT_SEQUENCES], description=text.description)
    smallest = BlockFormat(bits=4, block_size=block_size)
    errors = OutputErrors(source=source, block_size=block_size)
    formats = dict.fromkeys(matrix_names(source.config), smallest)
    quantizer = GptqQuantizer(source, calibration, folder, progress, errors.add)
    matrices = quantizer.quantize(formats)
    quantizer.observe = None
    meter = DivergenceMeter(load_reference(source), text.ids[-HELD_OUT_SEQUENCES:])
    groups = matrix_groups(source.config)
    options = measure_options(source, groups, matrices, meter, errors, progress)
    budget = allowed = BUDGET_SHARE * max_kld
    best = float("inf")
    for _ in range(MAX_ROUNDS):
        chosen = choose_formats(options, allowed)
        formats = {
            name: option.format
            for group, option in zip(groups, chosen, strict=True)
            for name in group
        }
        matrices = quantizer.quantize(formats)
        divergence = measure_quantized(matrices, meter)
        best = min(best, divergence)
        if divergence <= budget:
            return matrices
        if all(option == items[-1] for option, items in zip(chosen, options, strict=True)):
            break
        predicted = sum(option.divergence for option in chosen)
        allowed = min(allowed, predicted) * 0.9 * budget / divergence
    raise InputError(
        f"no choice of formats stays within a divergence of {max_kld} nats per token with room for "
        f"other text (the best has {best:.3g} on the calibration text); pass a larger --max-kld, "
        "or export with --dtype int8 or fp32"
    )


def matrix_groups(config: Gemma3Config) -> list[MatrixGroup]:
    """Return the matrices that share a format: those that the exporter packs into one product."""
    head = [] if config.tie_word_embeddings else [(HEAD,)]
    layers = [
        tuple(f"model.layers.{layer}.{name}.weight" for name in group)
        for layer in range(config.num_hidden_layers)
        for group in MATRIX_GROUPS
    ]
    return [(EMBEDDING,), *layers, *head]


def candidate_formats(columns: int, block_size: int) -> list[BlockFormat]:
    """Return the possible formats of a matrix, smallest first; ``block_size`` is the minimum."""
    found = []
    for bits, factor in ((4, 2), (4, 1), (8, 4), (8, 1)):
        size = block_size * factor
        if size <= 256 and columns % size == 0:
            found.append(BlockFormat(bits=bits, block_size=size))
    return found


# Measuring what each format costs


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatOption:
    """One possible format of a matrix group."""

    format: BlockFormat
    size_bytes: int
    divergence: float  # predicted contribution, nats per token


def measure_options(
    source: WeightSource,
    groups: Sequence[MatrixGroup],
    matrices: GptqMatrices,
    meter: DivergenceMeter,
    errors: OutputErrors,
    progress: Progress,
) -> list[list[FormatOption]]:
    """Measure each group's divergence in the format of ``matrices``; predict the other formats."""
    shapes = dict(source.config.weight_shapes())
    options = []
    for index, group in enumerate(groups):
        progress("measuring sensitivities", index, len(groups))
        weights = ((name, matrices.load(name).dequantize()) for name in group)
        measured = meter.measure(weights, {})
        rows, columns = sum(shapes[name][0] for name in group), shapes[group[0]][1]
        options.append(
            [
                FormatOption(
                    format=item,
                    size_bytes=item.size_bytes(rows, columns),
                    divergence=measured * errors.ratio(group, item, matrices.formats[group[0]]),
                )
                for item in candidate_formats(columns, errors.block_size)
            ]
        )
    progress("measuring sensitivities", len(groups), len(groups))
    return options


class LoadableMatrices(Protocol):
    """Quantized matrices by name, each with its format."""

    @property
    def formats(self) -> Mapping[str, BlockFormat]:
        """Format of each canonical matrix."""

    def load(self, name: str) -> BlockMatrix:
        """Return a whole matrix."""


def measure_quantized(matrices: LoadableMatrices, meter: DivergenceMeter) -> float:
    """Return the divergence with all matrices quantized and activations rounded as by kernels."""
    weights = ((name, matrices.load(name).dequantize()) for name in matrices.formats)
    return meter.measure(weights, matrices.formats)


@dataclass(kw_only=True)
class OutputErrors:
    """Squared output errors of matrices after rounding to nearest, by name and format."""

    source: WeightSource
    block_size: int
    by_format: dict[str, dict[BlockFormat, float]] = field(default_factory=dict)

    def add(self, names: Sequence[str], hessian: Hessian) -> None:
        """Measure matrices that share their inputs."""
        moment = hessian.mean().float()
        shapes = dict(self.source.config.weight_shapes())
        for name in names:
            rows = min(MAX_ERROR_ROWS, shapes[name][0])
            weights = self.source.read(name, 0, rows).float()
            self.by_format[name] = {}
            for item in candidate_formats(weights.shape[1], self.block_size):
                error = quantize(weights, item).dequantize() - weights
                self.by_format[name][item] = float(((error @ moment) * error).sum())

    def ratio(self, group: MatrixGroup, of: BlockFormat, to: BlockFormat) -> float:
        """Return the error in the format ``of`` relative to that in the format ``to``."""
        numerator = sum(self.by_format[name][of] for name in group)
        return numerator / max(sum(self.by_format[name][to] for name in group), 1e-30)


class DivergenceMeter:
    """Mean KL divergence between a model with changed weights and the original model.

    Args:
        model: full precision, in float32; every measurement restores its weights.
        ids: [R, T] text.
    """

    @torch.no_grad()
    def __init__(self, model: Gemma3, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.contexts = model.layer_contexts(ids, None, None)
        self.states: list[Tensor] = []  # [R, T, D] input of each layer

        def remember_input(
            layer: nn.Module, x: Tensor, context: LayerContext, past: KeyValue | None
        ) -> tuple[Tensor, KeyValue]:
            self.states.append(x)
            return layer(x, context, past)  # type: ignore[no-any-return]

        x, _ = model.run_layers(
            model.model.embed_tokens(ids),
            self.contexts,
            use_cache=False,
            run_layer=remember_input,
        )
        self.expected = self._predictions(x)

    @torch.no_grad()
    def measure(
        self, weights: Iterable[tuple[str, Tensor]], activation_blocks: Mapping[str, BlockFormat]
    ) -> float:
        """Return the divergence, in nats per token, with other ``weights``.

        Args:
            weights: canonical names and values; an iterator, so that not all need be in memory.
            activation_blocks: formats of matrices whose inputs are rounded to int8 too, as by
                the kernels.
        """
        before: dict[str, Tensor] = {}
        try:
            for name, weight in weights:
                parameter = self.model.get_parameter(name)
                before[name] = parameter.clone()
                parameter.copy_(weight)
            return self._divergence(before.keys(), activation_blocks)
        finally:
            for name, weight in before.items():
                self.model.get_parameter(name).copy_(weight)

    def _divergence(
        self, changed: Iterable[str], activation_blocks: Mapping[str, BlockFormat]
    ) -> float:
        first = 0 if activation_blocks else min(map(layer_of, changed), default=0)
        x = self.states[first] if first else self.model.model.embed_tokens(self.ids)
        rounding = ActivationRounding(self.model, activation_blocks)
        with rounding.enabled() if activation_blocks else nullcontext():
            layers = range(first, self.model.config.num_hidden_layers)
            x, _ = self.model.run_layers(x, self.contexts, layers=layers, use_cache=False)
            found = self._predictions(x)
        rounding.remove()
        return float((self.expected.exp() * (self.expected - found)).sum(-1).mean())

    def _predictions(self, x: Tensor) -> Tensor:
        """Return the log-probabilities [P, V] that follow from hidden states [R, T, D]."""
        normed = self.model.model.norm(x.flatten(0, 1)[::POSITION_STRIDE])
        logits: Tensor = self.model.head(normed, self.model.head_weight)
        return logits.log_softmax(-1)


def layer_of(name: str) -> int:
    """Return the layer of a canonical weight, 0 for weights outside of the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else 0


# Choosing formats within a budget


def choose_formats(groups: Sequence[Sequence[FormatOption]], budget: float) -> list[FormatOption]:
    """Return the smallest options whose divergences add up to at most ``budget``.

    Every group starts with its smallest option. Each step takes the option that saves the most
    divergence per added byte. The last step may overshoot, so smaller options are then restored
    where the budget allows. If no choice meets the budget, every group has its best option.
    """
    chosen = [min(options, key=lambda option: option.size_bytes) for options in groups]
    while sum(option.divergence for option in chosen) > budget:
        best, gain = None, 0.0
        for index, options in enumerate(groups):
            now = chosen[index]
            for option in options:
                saved = now.divergence - option.divergence
                if saved <= 0:
                    continue
                saved_per_byte = saved / max(1, option.size_bytes - now.size_bytes)
                if saved_per_byte > gain:
                    best, gain = (index, option), saved_per_byte
        if best is None:
            break
        chosen[best[0]] = best[1]
    return restore_smaller(chosen, groups, budget)


def restore_smaller(
    chosen: list[FormatOption], groups: Sequence[Sequence[FormatOption]], budget: float
) -> list[FormatOption]:
    """Return to smaller options within the budget, most bytes per added divergence first."""
    while True:
        room = budget - sum(option.divergence for option in chosen)
        best, gain = None, 0.0
        for index, options in enumerate(groups):
            now = chosen[index]
            for option in options:
                added = option.divergence - now.divergence
                saved_bytes = now.size_bytes - option.size_bytes
                if saved_bytes > 0 and added <= room and saved_bytes / max(added, 1e-12) > gain:
                    best, gain = (index, option), saved_bytes / max(added, 1e-12)
        if best is None:
            return chosen
        chosen[best[0]] = best[1]
