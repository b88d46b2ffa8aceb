"""Take text through the layers one at a time, and let each be quantised on the way.

Only one layer's weights are in memory. A layer sees what the quantised layers before it put out, so
its rounding also makes up for theirs.

Shapes: R sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gemma3_export.exporters.quantize.gptq import Hessian
from gemma3_export.reference.loading import EmbeddingLookup, LayerwiseForward
from gemma3_export.reference.model import DecoderLayer
from gemma3_export.reference.weights import WeightSource

__all__ = ["MATRIX_GROUPS", "LayerWalk", "Rounding"]

# Matrices of a layer that share their inputs, in the order in which data passes them.
MATRIX_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
BATCH_TOKENS = 2048

# Canonical names and the Hessian of their inputs, to their quantised weights.
Rounding = Callable[[Sequence[str], Hessian], Sequence[Tensor]]


class InputSeen(Exception):  # noqa: N818  (it is no error: it ends a forward pass early)
    """A matrix's input was counted, and what follows is of no interest."""


class LayerWalk:
    """Sends text through a model that is not in memory as a whole.

    Args:
        source: canonical weights.
        ids: [R, T] text, without padding.
        on_layer: called with the number of layers done, and of all layers.
    """

    def __init__(
        self, source: WeightSource, ids: Tensor, on_layer: Callable[[int, int], None]
    ) -> None:
        self.source, self.on_layer = source, on_layer
        self.parts = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))

    @torch.no_grad()
    def run(self, lookup: EmbeddingLookup, rounding: Rounding | None) -> Hessian:
        """Show every matrix of the layers to ``rounding``, with what goes into it.

        Args:
            lookup: the embedding.
            rounding: gets a group of matrices; what it returns replaces them for all that follows.

        Returns:
            The inputs of the head.

        Raises:
            InputError: a weight is not finite.
        """
        config = self.source.config
        forward = LayerwiseForward(self.source, self.parts, lookup)
        for index, layer in forward.layers():
            self.on_layer(index, config.num_hidden_layers)
            for group in MATRIX_GROUPS if rounding is not None else ():
                assert rounding is not None
                names = [f"model.layers.{index}.{name}.weight" for name in group]
                found = rounding(names, inputs_of(layer, group[0], forward))
                for name, weight in zip(group, found, strict=True):
                    layer.get_parameter(f"{name}.weight").copy_(weight)
            for batch in range(len(self.parts)):
                forward.step(batch)
        self.on_layer(config.num_hidden_layers, config.num_hidden_layers)
        norm = forward.final_norm()
        final = Hessian(config.hidden_size)
        for x in forward.states:
            final.add(norm(x))
        return final


def inputs_of(layer: DecoderLayer, name: str, forward: LayerwiseForward) -> Hessian:
    """What goes into the matrix ``name`` of ``layer`` for all of the text."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    hessian = Hessian(module.in_features)

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        hessian.add(inputs[0])
        raise InputSeen

    hook = module.register_forward_pre_hook(count)
    try:
        for batch, x in enumerate(forward.states):
            try:
                layer(x, forward.context(batch), None)
            except InputSeen:
                continue
    finally:
        hook.remove()
    return hessian
