"""Quantize decoder layers one at a time, with calibration text going through them.

Only one layer's weights are in memory. Each layer sees the outputs of the quantized layers before
it, so its rounding also compensates for theirs.

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

__all__ = ["MATRIX_GROUPS", "QuantizeGroup", "head_inputs", "quantize_layers"]

# The matrices of a layer by shared input, in execution order.
MATRIX_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
BATCH_TOKENS = 2048

# From canonical names and the Hessian of their inputs to their quantized weights.
QuantizeGroup = Callable[[Sequence[str], Hessian], Sequence[Tensor]]
OnLayer = Callable[[int, int], None]  # receives (layers done, number of layers)


@torch.no_grad()
def head_inputs(
    source: WeightSource, ids: Tensor, lookup: EmbeddingLookup, on_layer: OnLayer
) -> Hessian:
    """Return the second moment of the head's inputs in full precision.

    Args:
        source: canonical weights.
        ids: [R, T] text without padding.
        lookup: reads rows of the embedding.
        on_layer: called before each layer and at the end.

    Raises:
        InputError: a weight is not finite.
    """
    forward = LayerwiseForward(source, batches_of(ids), lookup)
    for index, _ in forward.layers():
        on_layer(index, source.config.num_hidden_layers)
        step_all(forward)
    on_layer(source.config.num_hidden_layers, source.config.num_hidden_layers)
    norm = forward.final_norm()
    hessian = Hessian(source.config.hidden_size)
    for x in forward.states:
        hessian.add(norm(x))
    return hessian


@torch.no_grad()
def quantize_layers(
    source: WeightSource,
    ids: Tensor,
    lookup: EmbeddingLookup,
    quantize: QuantizeGroup,
    on_layer: OnLayer,
) -> None:
    """Pass every matrix group of every layer to ``quantize``, with the Hessian of its inputs.

    Args:
        source: canonical weights.
        ids: [R, T] text without padding.
        lookup: reads rows of the quantized embedding.
        quantize: returns the quantized weights, which replace the originals from then on.
        on_layer: called before each layer and at the end.

    Raises:
        InputError: a weight is not finite.
    """
    forward = LayerwiseForward(source, batches_of(ids), lookup)
    for index, layer in forward.layers():
        on_layer(index, source.config.num_hidden_layers)
        for group in MATRIX_GROUPS:
            names = [f"model.layers.{index}.{name}.weight" for name in group]
            quantized = quantize(names, inputs_of(layer, group[0], forward))
            for name, weight in zip(group, quantized, strict=True):
                layer.get_parameter(f"{name}.weight").copy_(weight)
        step_all(forward)
    on_layer(source.config.num_hidden_layers, source.config.num_hidden_layers)


def batches_of(ids: Tensor) -> Sequence[Tensor]:
    """Split [R, T] text into batches of about :data:`BATCH_TOKENS`."""
    return torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))


def step_all(forward: LayerwiseForward) -> None:
    """Run all batches through the current layer."""
    for batch in range(len(forward.states)):
        forward.step(batch)


class InputSeen(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass once a matrix's inputs have been counted."""


def inputs_of(layer: DecoderLayer, name: str, forward: LayerwiseForward) -> Hessian:
    """Return the second moment of the inputs of the matrix ``name`` of ``layer``."""
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
