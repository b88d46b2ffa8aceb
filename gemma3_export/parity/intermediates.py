"""Values inside a step: what each sub-block of each layer gives, from hooks or from the graph.

Shapes: T new tokens, C any number of features.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemma3_export.errors import UnavailableError
from gemma3_export.reference.model import Gemma3, KeyValue
from gemma3_export.runtimes.onnx.graph_rewrites import read_graph
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.onnx.session import (
    WEIGHTS_FOLDER,
    as_float32,
    import_onnxruntime,
    run_graph,
    zeros,
)
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = [
    "BLOCKS",
    "OnnxTaps",
    "Tap",
    "Taps",
    "tap_model",
    "tapped_step",
]


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
    if isinstance(runtime, OnnxRuntime):
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


# Look inside an ONNX graph: expose what its nodes compute as further outputs of a copy.
#
# The copy is made in memory, its weights stay in the bundle's external data file. Nodes are
# found by
# their operator and their order within a layer; a graph that does not have them yields fewer taps.

NORMS = (
    "input_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
NORM_OPS = {"RMSNormalization", "SimplifiedLayerNormalization"}
ATTENTION_OPS = {"Attention", "GroupQueryAttention"}
PRODUCT_OPS = {"MatMul", "Gemm", "MatMulNBits"}
LAYER = re.compile(r"layer_(\d+)\.")


class OnnxTaps:
    """Runs a bundle's graph for one row and returns what its sub-blocks give.

    Raises:
        UnavailableError: the onnx package is missing.
    """

    def __init__(self, runtime: Any) -> None:
        try:
            import onnx
        except ImportError as error:
            raise UnavailableError(
                'naming the diverging layer needs onnx; run: pip install "gemma3-export[export]"'
            ) from error
        if runtime.uses_sliding_window_cache:  # the same nodes, with a cache that may be empty
            runtime = runtime.with_other_cache()
        self.runtime = runtime
        model = (
            onnx.load_model_from_string(runtime.graph)
            if isinstance(runtime.graph, bytes)
            else read_graph(runtime.graph)
        )
        self.names = tap_names(model.graph.node)
        known = {value.name for value in model.graph.output}
        model.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name)
            for name in dict.fromkeys(self.names.values())
            if name not in known
        )
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(WEIGHTS_FOLDER, str(runtime.weights_folder))
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=runtime.session.get_providers()
        )

    def __call__(self, before: IntArray, new: IntArray) -> Taps:
        """Sub-blocks' values for ``new`` after ``before``, which is fed first."""
        past = [
            zeros(
                (1, self.runtime.config.num_key_value_heads, 0, self.runtime.config.head_dim),
                spec.dtype,
            )
            for spec in self.runtime.signature.past
        ]
        if len(before):
            names = [spec.name for spec in self.runtime.signature.present]
            past = self._run(names, before, past, len(before))
        wanted = list(dict.fromkeys(self.names.values()))
        keys = [spec.name for spec in self.runtime.signature.present_keys]
        logits = self.runtime.signature.logits.name
        seen = len(before) + len(new)
        found = dict(
            zip(
                [*wanted, *keys, logits],
                map(as_float32, self._run([*wanted, *keys, logits], new, past, seen)),
                strict=True,
            )
        )
        count = len(new)
        taps = {tap: tokens_first(found[name], count) for tap, name in self.names.items()}
        for layer, name in enumerate(keys):
            key = found[name][0][:, len(before) : len(before) + count]
            taps[Tap(layer, ROTARY_KEY)] = flat(torch.from_numpy(key).transpose(0, 1))
        taps[Tap(None, "head")] = torch.from_numpy(found[logits][0])
        return taps

    def _run(self, outputs: list[str], ids: IntArray, past: list[Any], total: int) -> list[Any]:
        signature = self.runtime.signature
        feeds: dict[str, Any] = {
            signature.input_ids.name: np.ascontiguousarray(ids[None]),
            signature.attention_mask.name: np.ones((1, total), np.int64),
        }
        feeds |= {spec.name: value for spec, value in zip(signature.past, past, strict=True)}
        return run_graph(self.session, outputs, feeds)


def tap_names(nodes: Any) -> dict[Tap, str]:
    """Which value of the graph is which sub-block's output."""
    layers: dict[int, list[Any]] = {}
    outside = []
    for node in nodes:
        match = LAYER.match(node.name)
        if match:
            layers.setdefault(int(match.group(1)), []).append(node)
        else:
            outside.append(node)
    names: dict[Tap, str] = {}
    for layer, own in layers.items():
        names |= {Tap(layer, block): name for block, name in layer_names(own).items()}
    norms = [node for node in outside if node.op_type in NORM_OPS]
    if len(norms) == 1:
        names[Tap(None, "norm")] = norms[0].output[0]
    return names


def layer_names(nodes: list[Any]) -> dict[str, str]:
    """Sub-block to value name within one layer; nodes are in execution order."""
    names: dict[str, str] = {}
    norms = [node.output[0] for node in nodes if node.op_type in NORM_OPS]
    if len(norms) == len(NORMS):
        names |= dict(zip(NORMS, norms, strict=True))
    attention = [index for index, node in enumerate(nodes) if node.op_type in ATTENTION_OPS]
    if len(attention) == 1:
        names[ATTEND] = nodes[attention[0]].output[0]
        after = [node for node in nodes[attention[0] :] if node.op_type in PRODUCT_OPS]
        if len(after) >= 2:
            names["self_attn.o_proj"] = after[0].output[0]
            names["mlp"] = after[-1].output[0]
    return names


def tokens_first(array: Any, count: int) -> torch.Tensor:
    """[1, T, ...] or [1, N, T, H] (standard Attention) to [T, C]."""
    value = torch.from_numpy(np.asarray(array))[0]
    if value.ndim == 3 and value.shape[0] != count:
        value = value.transpose(0, 1)
    return flat(value)
