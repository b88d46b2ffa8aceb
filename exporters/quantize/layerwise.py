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
from gemma3_export.reference.model import DecoderLayer, Gemma3, LayerContext, ScaledEmbedding
from gemma3_export.reference.weights import WeightSource, check_finite

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
Lookup = Callable[[Tensor], Tensor]  # token ids to rows of the embedding


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
        with torch.device("meta"):
            self.model = Gemma3(source.config)
        self.parts = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))
        self.contexts = self.model.layer_contexts(ids[:1], None, None)

    @torch.no_grad()
    def run(self, lookup: Lookup, rounding: Rounding | None) -> Hessian:
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
        states = [self._embed(lookup, part) for part in self.parts]
        for index, kind in enumerate(config.layer_types):
            self.on_layer(index, config.num_hidden_layers)
            layer = self._load(self.model.model.layers[index], f"model.layers.{index}")
            assert isinstance(layer, DecoderLayer)
            for group in MATRIX_GROUPS if rounding is not None else ():
                assert rounding is not None
                names = [f"model.layers.{index}.{name}.weight" for name in group]
                found = rounding(names, inputs_of(layer, group[0], states, self.contexts[kind]))
                for name, weight in zip(group, found, strict=True):
                    layer.get_parameter(f"{name}.weight").copy_(weight)
            states = [layer(x, self.contexts[kind], None)[0] for x in states]
            layer.to("meta")
        self.on_layer(config.num_hidden_layers, config.num_hidden_layers)
        norm = self._load(self.model.model.norm, "model.norm")
        final = Hessian(config.hidden_size)
        for x in states:
            final.add(norm(x))
        return final

    def _embed(self, lookup: Lookup, ids: Tensor) -> Tensor:
        """[R, T] to [R, T, D], with no more rows of the embedding than occur."""
        unique, places = torch.unique(ids, return_inverse=True)
        table = ScaledEmbedding(len(unique), self.source.config.hidden_size)
        table.weight.copy_(lookup(unique))
        found: Tensor = table(places)
        return found

    def _load(self, module: nn.Module, path: str) -> nn.Module:
        """Fill a module without memory with the canonical weights below ``path``, in float32."""
        module.to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            weight = self.source.read(f"{path}.{name}")
            check_finite(f"{path}.{name}", weight)
            parameter.copy_(weight)
        return module


def inputs_of(
    layer: DecoderLayer, name: str, states: Sequence[Tensor], context: LayerContext
) -> Hessian:
    """What goes into the matrix ``name`` of ``layer`` for all of the text."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    hessian = Hessian(module.in_features)

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        hessian.add(inputs[0])
        raise InputSeen

    hook = module.register_forward_pre_hook(count)
    try:
        for x in states:
            try:
                layer(x, context, None)
            except InputSeen:
                continue
    finally:
        hook.remove()
    return hessian
