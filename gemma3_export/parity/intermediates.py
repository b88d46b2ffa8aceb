"""Values inside a step: what each sub-block of each layer gives, from hooks or from the graph.

Shapes: T new tokens, C any number of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemma3_export.reference.model import Gemma3, KeyValue
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = ["BLOCKS", "Tap", "Taps", "tap_model", "tapped_step"]


@dataclass(frozen=True, slots=True)
class Tap:
    """A place in the model; ``layer`` is None outside the layers."""

    layer: int | None
    block: str


Taps = dict[Tap, Tensor]  # each [T, C], in any order

# What a layer computes, in order. Names are the reference's modules but for three.
ROTARY_KEY, ATTEND = "self_attn.rotary", "self_attn.attend"
BLOCKS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    ROTARY_KEY,  # keys as they enter the cache
    ATTEND,  # what the output projection takes
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp",
    "post_feedforward_layernorm",
)


@torch.inference_mode()
def tap_model(model: Gemma3, ids: IntArray, past: list[KeyValue] | None = None) -> Taps:
    """One forward pass over ids [T] with every sub-block's output."""
    taps: Taps = {}
    handles = [
        module.register_forward_hook(partial(_keep_output, taps, Tap(layer, block)))
        for layer, block, module in _places(model)
    ]
    handles += [
        layer.self_attn.o_proj.register_forward_pre_hook(
            partial(_keep_input, taps, Tap(index, ATTEND))
        )
        for index, layer in enumerate(_layers(model))
        if isinstance(layer.self_attn.o_proj, nn.Module)
    ]
    try:
        output = model(torch.from_numpy(ids)[None].to(model.head_weight.device), None, past)
    finally:
        for handle in handles:
            handle.remove()
    for index, (key, _) in enumerate(output.past_key_values):
        taps[Tap(index, ROTARY_KEY)] = flat(key[0, :, -len(ids) :].transpose(0, 1))
    taps[Tap(None, "head")] = output.logits[0].cpu()
    return taps


def tapped_step(runtime: Runtime) -> Callable[[IntArray, IntArray], Taps] | None:
    """A function of (tokens before, new tokens), or None when this backend cannot be opened."""
    if runtime.name == "onnx":
        from gemma3_export.parity.onnx_taps import OnnxTaps

        return OnnxTaps(runtime)
    model = getattr(runtime, "model", None)
    if isinstance(model, Gemma3):
        return partial(_tap_after, model)
    return None


@torch.inference_mode()
def _tap_after(model: Gemma3, before: IntArray, new: IntArray) -> Taps:
    past = None
    if len(before):
        ids = torch.from_numpy(before)[None].to(model.head_weight.device)
        past = model(ids, None, None, num_logits_to_keep=1).past_key_values
    return tap_model(model, new, past)


def _layers(model: Gemma3) -> list[Any]:
    return list(model.model.layers)


def _places(model: Gemma3) -> list[tuple[int | None, str, nn.Module]]:
    places: list[tuple[int | None, str, nn.Module]] = [
        (None, "embed_tokens", model.model.embed_tokens),
        (None, "norm", model.model.norm),
    ]
    for index, layer in enumerate(_layers(model)):
        modules = dict(layer.named_modules())
        places += [(index, block, modules[block]) for block in BLOCKS if block in modules]
    return places


def _keep_output(taps: Taps, tap: Tap, module: nn.Module, inputs: Any, output: Tensor) -> None:
    del module, inputs
    taps[tap] = flat(output[0])


def _keep_input(taps: Taps, tap: Tap, module: nn.Module, inputs: tuple[Tensor]) -> None:
    del module
    taps[tap] = flat(inputs[0][0])


def flat(value: Tensor) -> Tensor:
    """[T, ...] to a copy [T, C] on the CPU."""
    return value.reshape(value.shape[0], -1).to("cpu", copy=True)
