"""What the rounding of each matrix does to the model's predictions, and the formats to choose.

Divergences are measured on text, with one product's matrices quantised and all others whole. The
divergence is quadratic in a small error, so that of another format follows from the squared error
of the matrix's outputs, and those of all matrices add up, about.

Shapes: R sequences, T tokens, P compared positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma3_export.bundle.block_format import BlockFormat
from gemma3_export.parity.rounding import ActivationRounding
from gemma3_export.reference.model import Gemma3

__all__ = ["DivergenceMeter", "Option", "choose_options"]

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
        self.states: list[Tensor] = []  # [R, T, D] what goes into each layer
        x = model.model.embed_tokens(ids)
        for index in range(model.config.num_hidden_layers):
            self.states.append(x)
            x = self._layer(index, x)
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
        with rounding.on() if activation_blocks else nullcontext():
            for index in range(first, self.model.config.num_hidden_layers):
                x = self._layer(index, x)
            found = self._predictions(x)
        rounding.remove()
        return float((self.expected.exp() * (self.expected - found)).sum(-1).mean())

    def _layer(self, index: int, x: Tensor) -> Tensor:
        kind = self.model.config.layer_types[index]
        found: Tensor = self.model.model.layers[index](x, self.contexts[kind], None)[0]
        return found

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
