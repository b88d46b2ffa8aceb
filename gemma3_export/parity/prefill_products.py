"""Compute tokens of a prompt as a bundle's graph for prompts does, in the reference.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from gemma3_export.parity.rounding import round_to_int8
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.weights.bundle_weights import PrefillWeights

__all__ = ["PrefillProducts", "PrefillTokens"]


@dataclass(frozen=True, slots=True)
class PrefillTokens:
    """Which tokens run in the graph for prompts, and the weights of that graph."""

    weights: PrefillWeights
    positions: Sequence[Tensor]  # [T] bool of each sequence


class PrefillProducts:
    """Hooks that compute some tokens of a model as the graph for prompts does.

    Create it before other hooks on inputs, because it needs the inputs as they were.

    Args:
        model: the model that receives the hooks.
        tokens: the tokens and the weights.
    """

    def __init__(self, model: Gemma3, tokens: PrefillTokens) -> None:
        self.tokens = tokens
        self.positions = tokens.positions[0]  # [T] of the sequence that runs now
        self.is_rounded = False
        for name in tokens.weights.formats:
            module = model.get_submodule(name.rpartition(".")[0])
            inputs: list[Tensor] = []
            module.register_forward_pre_hook(partial(self._remember, inputs))
            module.register_forward_hook(partial(self._replace, name, inputs))

    def choose(self, sequence: int, *, is_rounded: bool) -> None:
        """Compute the tokens of a sequence from now on; round their activations or not."""
        self.positions, self.is_rounded = self.tokens.positions[sequence], is_rounded

    def _remember(self, kept: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        kept[:] = inputs[:1]

    def _replace(
        self, name: str, kept: list[Tensor], module: nn.Module, inputs: Any, output: Tensor
    ) -> Tensor:
        del module, inputs
        x = kept.pop()[:, self.positions]
        if not x.shape[1]:
            return output
        if self.is_rounded:
            x = round_to_int8(x, self.tokens.weights.formats[name])
        result = output.clone()
        result[:, self.positions] = F.linear(x, self.tokens.weights.read(name).to(x))
        return result
