"""Packed projections: one matrix product in place of two or three of the reference.

This module defines which layers are packed, and how canonical weights make up a packed tensor. Each
exporter brings its own kind of matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gemma3_export.bundle import WeightRecipe
from gemma3_export.config import Gemma3Config
from gemma3_export.reference.model import MLP, Attention, Gemma3

__all__ = ["PackedAttention", "PackedMLP", "PackedProjection", "weight_recipes"]


class PackedProjection(nn.Module):
    """Several bias-free linear layers with the same input, as one product.

    ``sources`` names the layers that it replaces, relative to its parent module. Subclasses define
    how the weight is stored (``is_transposed``: input-major) and multiplied.
    """

    is_transposed = False

    def __init__(
        self, in_features: int, out_features: Sequence[int], sources: Sequence[str]
    ) -> None:
        super().__init__()
        shape = (sum(out_features), in_features)
        self.weight = nn.Parameter(torch.empty(shape[::-1] if self.is_transposed else shape))
        self.out_features = tuple(out_features)
        self.sources = tuple(sources)

    def product(self, x: Tensor) -> Tensor:
        """Multiply [B, T, in] to [B, T, sum of out_features]."""
        raise NotImplementedError

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Split [B, T, sum of out_features] into one [B, T, out] per source."""
        return torch.split(y, list(self.out_features), dim=-1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Project [B, T, in] to [B, T, out], or to a tuple of them for several sources."""
        y = self.product(x)
        return y if len(self.out_features) == 1 else self.split(y)


Projection = Callable[[int, Sequence[int], Sequence[str]], PackedProjection]


class PackedMLP(MLP):
    """The reference's MLP with gate and up projections in one product."""

    def __init__(self, config: Gemma3Config, projection: Projection) -> None:
        nn.Module.__init__(self)
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_up = projection(hidden, (intermediate,) * 2, ("gate_proj", "up_proj"))
        down = projection(intermediate, (hidden,), ("down_proj",))
        self.down_proj = down  # type: ignore[assignment]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up projections, each [B, T, intermediate_size]."""
        gate, up = self.gate_up(x)
        return gate, up


class PackedAttention(Attention):
    """The reference's attention with query, key and value projections in one product."""

    def __init__(self, original: Attention, projection: Projection) -> None:
        nn.Module.__init__(self)
        config = self.config = original.config
        self.layer = original.layer
        self.q_norm, self.k_norm = original.q_norm, original.k_norm
        sizes = (config.query_size, config.key_value_size, config.key_value_size)
        self.qkv = projection(config.hidden_size, sizes, ("q_proj", "k_proj", "v_proj"))
        out = projection(config.query_size, (config.hidden_size,), ("o_proj",))
        self.o_proj = out  # type: ignore[assignment]

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, N*H], keys and values [B, T, K*H]."""
        q, k, v = self.qkv(x_BTD)
        return q, k, v


def weight_recipes(model: Gemma3) -> dict[str, WeightRecipe]:
    """Return how to make each parameter of a packed model from canonical weights."""
    recipes = {name: WeightRecipe(names=(name,)) for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, PackedProjection):
            parent = path.rpartition(".")[0]
            names = tuple(f"{parent}.{source}.weight" for source in module.sources)
            recipes[f"{path}.weight"] = WeightRecipe(names=names, transposed=module.is_transposed)
    return recipes
