"""Give every matrix the format that its sensitivity deserves: ``--dtype mixed``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma3_export.bundle import BlockFormat
from gemma3_export.config import EMBEDDING, HEAD, Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.exporters.quantize.calibration import Calibration
from gemma3_export.exporters.quantize.gptq import Hessian
from gemma3_export.exporters.quantize.gptq_quantizer import GptqMatrices, GptqQuantizer
from gemma3_export.exporters.quantize.layerwise import MATRIX_GROUPS
from gemma3_export.exporters.quantize.quantizers import matrix_names
from gemma3_export.parity.rounding import ActivationRounding
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3, KeyValue, LayerContext
from gemma3_export.reference.weights import WeightSource
from gemma3_export.reference.weights.block_matrix import quantize

__all__ = [
    "DivergenceMeter",
    "Option",
    "candidate_formats",
    "choose_options",
    "quantize_mixed",
]

Product = tuple[str, ...]  # canonical names of matrices that are stored as one

JUDGES = 8  # sequences of the text that divergences are measured on, and no Hessian sees
ROUNDS = 4
MARGIN = 0.8  # of the budget: other text diverges otherwise than this one
SAMPLED_ROWS = 4096  # of a large matrix, for its output errors


def products_of(config: Gemma3Config) -> list[Product]:
    """What shares a format: matrices of one product, as the exporter packs them."""
    head = [] if config.tie_word_embeddings else [(HEAD,)]
    layers = [
        tuple(f"model.layers.{layer}.{name}.weight" for name in group)
        for layer in range(config.num_hidden_layers)
        for group in MATRIX_GROUPS
    ]
    return [(EMBEDDING,), *layers, *head]


def candidate_formats(columns: int, block_size: int) -> list[BlockFormat]:
    """What a matrix may be stored as, the smallest first; ``block_size`` is the finest."""
    found = []
    for bits, factor in ((4, 2), (4, 1), (8, 4), (8, 1)):
        size = block_size * factor
        if size <= 256 and columns % size == 0:
            found.append(BlockFormat(bits=bits, block_size=size))
    return found


@dataclass(kw_only=True)
class OutputErrors:
    """Squared errors of the outputs of matrices rounded to the nearest codes, by format."""

    source: WeightSource
    block_size: int
    of: dict[str, dict[BlockFormat, float]] = field(default_factory=dict)

    def add(self, names: Sequence[str], hessian: Hessian) -> None:
        """Measure some matrices that share their inputs."""
        moment = hessian.mean().float()
        for name in names:
            weights = self.source.read(name, 0, self._rows(name)).float()
            self.of[name] = {}
            for item in candidate_formats(weights.shape[1], self.block_size):
                error = quantize(weights, item).dequantize() - weights
                self.of[name][item] = float(((error @ moment) * error).sum())

    def ratio(self, product: Product, of: BlockFormat, to: BlockFormat) -> float:
        """How much larger the error is in one format than in the other."""
        found = sum(self.of[name][of] for name in product)
        return found / max(sum(self.of[name][to] for name in product), 1e-30)

    def _rows(self, name: str) -> int:
        return min(SAMPLED_ROWS, dict(self.source.config.weight_shapes())[name][0])


def quantize_mixed(
    source: WeightSource,
    text: Calibration,
    block_size: int,
    max_kld: float,
    folder: Path,
    progress: Progress,
) -> GptqMatrices:
    """Quantise every matrix, the least sensitive ones most, within a divergence budget.

    The model is held in memory twice, unlike with one format for all.

    Args:
        source: canonical weights.
        text: its last sequences measure divergences, the others calibrate.
        block_size: the finest blocks.
        max_kld: the budget, mean nats a token.
        folder: empty; it holds the matrices as long as they are needed.
        progress: told what is being done.

    Raises:
        InputError: no format keeps to the budget, or blocks do not divide a matrix.
    """
    learnt = Calibration(ids=text.ids[:-JUDGES], description=text.description)
    narrow = BlockFormat(bits=4, block_size=block_size)
    errors = OutputErrors(source=source, block_size=block_size)
    formats = dict.fromkeys(matrix_names(source.config), narrow)
    calibrator = GptqQuantizer(source, learnt, folder, progress, errors.add)
    blocks = calibrator.quantize(formats)
    meter = DivergenceMeter(load_reference(source), text.ids[-JUDGES:])
    products = products_of(source.config)
    options = measure_options(source, products, blocks, meter, errors, progress)
    budget = allowed = MARGIN * max_kld
    best = float("inf")
    for _ in range(ROUNDS):
        chosen = choose_options(options, allowed)
        formats = {
            name: option.format
            for product, option in zip(products, chosen, strict=True)
            for name in product
        }
        calibrator.observe = None
        blocks = calibrator.quantize(formats)
        found = measure_all(blocks, meter)
        best = min(best, found)
        if found <= budget:
            return blocks
        if all(option == items[-1] for option, items in zip(chosen, options, strict=True)):
            break
        predicted = sum(option.divergence for option in chosen)
        allowed = min(allowed, predicted) * 0.9 * budget / found
    raise InputError(
        f"no choice of formats keeps to a divergence of {max_kld} with room for other text: the "
        f"best one reached has {best:.3g} nats a token on the calibration text; give a larger "
        "--max-kld, or export with --dtype int8 or fp32"
    )


def measure_options(
    source: WeightSource,
    products: Sequence[Product],
    blocks: GptqMatrices,
    meter: DivergenceMeter,
    errors: OutputErrors,
    progress: Progress,
) -> list[list[Option]]:
    """The divergence of each product in the format of ``blocks``, and from it in all others."""
    shapes = dict(source.config.weight_shapes())
    options = []
    for index, product in enumerate(products):
        progress("measuring sensitivities", index, len(products))
        weights = ((name, blocks.load(name).dequantize()) for name in product)
        measured = meter.with_changed(weights, {})
        rows, columns = sum(shapes[name][0] for name in product), shapes[product[0]][1]
        options.append(
            [
                Option(
                    format=item,
                    size_bytes=item.size_bytes(rows, columns),
                    divergence=measured * errors.ratio(product, item, blocks.formats[product[0]]),
                )
                for item in candidate_formats(columns, errors.block_size)
            ]
        )
    progress("measuring sensitivities", len(products), len(products))
    return options


def measure_all(blocks: GptqMatrices, meter: DivergenceMeter) -> float:
    """The divergence with every matrix quantised, and activations as the kernels round them."""
    rounded = {name: item.block_size for name, item in blocks.formats.items()}
    weights = ((name, blocks.load(name).dequantize()) for name in blocks.formats)
    return meter.with_changed(weights, rounded)


# What the rounding of each matrix does to the model's predictions, and the formats to choose.
#
# Divergences are measured on text, with one product's matrices quantised and all others whole. The
# divergence is quadratic in a small error, so that of another format follows from the squared error
# of the matrix's outputs, and those of all matrices add up, about.
#
# Shapes: R sequences, T tokens, P compared positions, D hidden size, V vocabulary.

STRIDE = 5  # of the positions whose predictions are compared: the head is most of the work


class DivergenceMeter:
    """Mean KL divergence of a changed model from what it was when the meter was made.

    Args:
        model: full precision, in float32; it is as it was after each measurement.
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
    def with_changed(
        self, weights: Iterable[tuple[str, Tensor]], activation_blocks: Mapping[str, int]
    ) -> float:
        """The divergence, nats a token, with other ``weights`` under their canonical names.

        Args:
            weights: one at a time, so that all of them need not be in memory.
            activation_blocks: matrices whose inputs are rounded to int8 as well, as the kernels do,
                and in blocks of how many columns.
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

    def _divergence(self, changed: Iterable[str], activation_blocks: Mapping[str, int]) -> float:
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
        """[R, T, D] to [P, V] log-probabilities."""
        normed = self.model.model.norm(x.flatten(0, 1)[::STRIDE])
        logits: Tensor = self.model.head(normed, self.model.head_weight)
        return logits.log_softmax(-1)


def layer_of(name: str) -> int:
    """The layer that a canonical weight stands in; 0 for what stands in none."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One format for the matrices of one product."""

    format: BlockFormat
    size_bytes: int
    divergence: float  # nats a token that it adds, predicted


def choose_options(products: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """The smallest options whose divergences add up to at most ``budget``.

    Each product begins with its smallest option, and the step that saves most divergence for a
    byte comes next. A last, large step may leave room, so what the budget allows is taken back.
    When nothing reaches the budget, every product ends with its best option.
    """
    chosen = [min(options, key=lambda option: option.size_bytes) for options in products]
    while sum(option.divergence for option in chosen) > budget:
        best, gain = None, 0.0
        for index, options in enumerate(products):
            now = chosen[index]
            for option in options:
                saved = now.divergence - option.divergence
                if saved <= 0:
                    continue
                for_a_byte = saved / max(1, option.size_bytes - now.size_bytes)
                if for_a_byte > gain:
                    best, gain = (index, option), for_a_byte
        if best is None:
            break
        chosen[best[0]] = best[1]
    return take_back(chosen, products, budget)


def take_back(
    chosen: list[Option], products: Sequence[Sequence[Option]], budget: float
) -> list[Option]:
    """Go back to smaller options while the budget allows, most bytes for a divergence first."""
    while True:
        room = budget - sum(option.divergence for option in chosen)
        best, gain = None, 0.0
        for index, options in enumerate(products):
            now = chosen[index]
            for option in options:
                added = option.divergence - now.divergence
                saved_bytes = now.size_bytes - option.size_bytes
                if saved_bytes > 0 and added <= room and saved_bytes / max(added, 1e-12) > gain:
                    best, gain = (index, option), saved_bytes / max(added, 1e-12)
        if best is None:
            return chosen
        chosen[best[0]] = best[1]
