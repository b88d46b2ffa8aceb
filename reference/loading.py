"""Load the reference model from any source of weights, as a whole or one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from gemma3_export.config import EMBEDDING
from gemma3_export.reference.model import (
    DecoderLayer,
    Gemma3,
    KeyValue,
    LayerContext,
    RMSNorm,
    ScaledEmbedding,
)
from gemma3_export.reference.weights import WeightSource, check_finite

__all__ = ["EmbeddingLookup", "LayerwiseForward", "load_module", "load_reference"]

EmbeddingLookup = Callable[[Tensor], Tensor]  # [N] distinct token ids to [N, D] unscaled rows
Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def load_reference(
    source: WeightSource,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Gemma3:
    """Load the reference model with the weights of ``source``, in evaluation mode.

    Weights are copied in chunks, so peak memory is the model plus one chunk.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """
    with torch.device("meta"):
        model = Gemma3(source.config)
    return load_module(model, "", source, dtype, device)


@torch.no_grad()
def load_module(
    module: Module,
    prefix: str,
    source: WeightSource,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Module:
    """Allocate and fill a module that was created on the meta device.

    Args:
        module: the reference model or a part of it.
        prefix: canonical name of ``module`` with a trailing dot, or empty for the model.
        source: canonical weights.
        dtype: dtype to convert the weights to.
        device: device to allocate the module on.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for own_name, parameter in module.named_parameters():
        name, start = prefix + own_name, 0
        for chunk in source.chunks(name):
            check_finite(name, chunk)
            parameter[start : start + chunk.shape[0]] = chunk.to(dtype)
            start += chunk.shape[0]
    return module


class LayerwiseForward:
    """An uncached forward pass over several batches with one decoder layer in memory.

    :meth:`layers` yields each loaded layer. The caller may add hooks to it or change its weights.
    :meth:`step` then runs one batch through it::

        forward = LayerwiseForward(source, batches)
        for index, layer in forward.layers():
            for batch in range(len(batches)):
                forward.step(batch)
        norm = forward.final_norm()

    Args:
        source: canonical weights.
        batches: token ids [B, T] without padding.
        lookup: returns unscaled embeddings of token ids; None reads them from ``source``.
        dtype: dtype to convert the weights to.
        copies: a pass that goes through the layers one step ahead, whose loaded weights are copied;
            None reads them from ``source``.
    """

    def __init__(
        self,
        source: WeightSource,
        batches: Sequence[Tensor],
        lookup: EmbeddingLookup | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        copies: LayerwiseForward | None = None,
    ) -> None:
        self.source, self.dtype, self.copies = source, dtype, copies
        with torch.device("meta"):
            self.model = Gemma3(source.config).to(dtype)
        self.contexts = [self.model.layer_contexts(ids, None, None) for ids in batches]
        self.states = [self._embed(lookup or self._read_rows, ids) for ids in batches]
        self._current = 0

    def layers(self) -> Iterator[tuple[int, DecoderLayer]]:
        """Yield each loaded layer with its index; free it afterwards.

        Raises:
            InputError: a weight holds NaN or infinity, or the source cannot be read.
        """
        for index, layer in enumerate(self.model.model.layers):
            assert isinstance(layer, DecoderLayer)
            self._current = index
            yield index, self._load(layer, f"model.layers.{index}.")
            layer.to("meta")

    def context(self, batch: int) -> LayerContext:
        """Return the context of a batch for the current layer."""
        return self.contexts[batch][self.source.config.layer_types[self._current]]

    def step(self, batch: int) -> tuple[Tensor, KeyValue]:
        """Run a batch through the current layer; return its output [B, T, D] and its cache."""
        layers = range(self._current, self._current + 1)
        states, (present,) = self.model.run_layers(
            self.states[batch], self.contexts[batch], layers=layers
        )
        self.states[batch] = states
        return states, present

    def final_norm(self) -> RMSNorm:
        """Load the norm between the last layer and the head.

        Raises:
            InputError: a weight holds NaN or infinity, or the source cannot be read.
        """
        return self._load(self.model.model.norm, "model.norm.")

    @torch.no_grad()
    def _load(self, module: Module, prefix: str) -> Module:
        if self.copies is None:
            return load_module(module, prefix, self.source, self.dtype)
        module = module.to_empty(device="cpu").eval().requires_grad_(False)
        originals = self.copies.model.get_submodule(prefix.removesuffix("."))
        for parameter, original in zip(module.parameters(), originals.parameters(), strict=True):
            parameter.copy_(original)
        return module

    def _embed(self, lookup: EmbeddingLookup, ids: Tensor) -> Tensor:
        """Embed [B, T] token ids, looking up each distinct id once."""
        unique, places = torch.unique(ids, return_inverse=True)
        table = ScaledEmbedding(len(unique), self.source.config.hidden_size).to(self.dtype)
        with torch.no_grad():
            table.weight.copy_(lookup(unique))
            embedded: Tensor = table(places)
        return embedded

    def _read_rows(self, ids: Tensor) -> Tensor:
        return torch.cat([self.source.read(EMBEDDING, row, row + 1) for row in ids.tolist()])
