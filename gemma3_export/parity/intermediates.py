"""Expose the intermediate values of a step: the output of every block of every layer.

The reference exposes them through hooks. Of an ONNX graph, a copy gets further outputs; it is made
in memory, and its weights stay in the bundle's external data file. Nodes are found by operator and
by their order within a layer; a graph without them yields fewer intermediates.

Shapes: T new tokens, C any number of features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemma3_export.errors import UnavailableError
from gemma3_export.parity.reference_pair import ReferencePair, head_blocks
from gemma3_export.reference.model import Gemma3, KeyValue
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.runtimes.onnx.graph_rewrites import read_graph
from gemma3_export.runtimes.onnx.ort_values import as_float32, run_graph, zeros
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.onnx.session import WEIGHTS_FOLDER, import_onnxruntime
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = [
    "ATTEND",
    "BLOCKS",
    "ROTARY_KEY",
    "Intermediates",
    "OnnxIntermediates",
    "Place",
    "open_intermediates",
    "pair_intermediates",
]


@dataclass(frozen=True, slots=True)
class Place:
    """A block of the model; ``layer`` is None outside the layers."""

    layer: int | None
    block: str


# Each [T, C], in any order; that of the head holds the last HEAD_TOKENS tokens at most.
Intermediates = dict[Place, Tensor]
IntermediatesOfStep = Callable[[IntArray, IntArray], Intermediates]  # (past ids, new ids)

HEAD_TOKENS = 16  # a token's logits take 2 MB in float64
# The blocks of a layer in order of computation. All but two are modules of the reference.
ROTARY_KEY, ATTEND = "self_attn.rotary", "self_attn.attend"
BLOCKS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    ROTARY_KEY,  # keys as they enter the cache
    ATTEND,  # input of the output projection
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp",
    "post_feedforward_layernorm",
)


@torch.inference_mode()
def pair_intermediates(pair: ReferencePair) -> tuple[Intermediates, Intermediates]:
    """Run a pair over its first batch and return the output of every block, exact and rounded."""
    found: tuple[Intermediates, Intermediates] = ({}, {})
    for into, forward in zip(found, pair.passes, strict=True):
        into[Place(None, "embed_tokens")] = flat(forward.states[0][0])
    for index in pair.layers():
        for into, forward in zip(found, pair.passes, strict=True):
            with exposed(into, {index: forward.model.model.layers[index]}):
                _, (key, _) = forward.step(0)
            into[Place(index, ROTARY_KEY)] = flat(key[0].transpose(0, 1))
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    normed = [states[0] for states in pair.normed()]
    for into, states in zip(found, normed, strict=True):
        into[Place(None, "norm")] = flat(states)
    for _, weight in head_blocks(pair.source, HEAD_TOKENS):
        for logits, forward, states in zip(parts, pair.passes, normed, strict=True):
            logits.append(forward.model.head(states[-HEAD_TOKENS:], weight.to(forward.dtype)))
    for into, logits in zip(found, parts, strict=True):
        into[Place(None, "head")] = torch.cat(logits, dim=-1)
    return found


@torch.inference_mode()
def model_intermediates(
    model: Gemma3, ids: IntArray, past: list[KeyValue] | None = None
) -> Intermediates:
    """Run one forward pass of a whole model over ids [T] and return the output of every block."""
    found: Intermediates = {}
    outer = {"embed_tokens": model.model.embed_tokens, "norm": model.model.norm}
    with exposed(found, dict(enumerate(model.model.layers)), outer):
        output = model(
            torch.from_numpy(ids)[None].to(model.head_weight.device),
            None,
            past,
            num_logits_to_keep=min(HEAD_TOKENS, len(ids)),
        )
    for index, (key, _) in enumerate(output.past_key_values):
        found[Place(index, ROTARY_KEY)] = flat(key[0, :, -len(ids) :].transpose(0, 1))
    found[Place(None, "head")] = output.logits[0].cpu()
    return found


@contextmanager
def exposed(
    found: Intermediates,
    layers: Mapping[int, nn.Module],
    outer: Mapping[str, nn.Module] | None = None,
) -> Iterator[None]:
    """Record the outputs of the blocks of ``layers``, and of modules outside them."""
    handles = [
        module.register_forward_hook(partial(_keep_output, found, Place(None, block)))
        for block, module in (outer or {}).items()
    ]
    for index, layer in layers.items():
        modules = dict(layer.named_modules())
        handles += [
            modules[block].register_forward_hook(partial(_keep_output, found, Place(index, block)))
            for block in BLOCKS
            if block in modules
        ]
        projection = modules.get("self_attn.o_proj")
        if projection is not None:
            hook = partial(_keep_input, found, Place(index, ATTEND))
            handles.append(projection.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def open_intermediates(runtime: Runtime) -> IntermediatesOfStep | None:
    """Return a function of (past ids, new ids), or None if the backend exposes no intermediates."""
    if isinstance(runtime, OnnxRuntime):
        return OnnxIntermediates(runtime)
    if isinstance(runtime, ReferenceRuntime):
        return partial(_reference_step, runtime.model)
    return None


@torch.inference_mode()
def _reference_step(model: Gemma3, before: IntArray, new: IntArray) -> Intermediates:
    past = None
    if len(before):
        ids = torch.from_numpy(before)[None].to(model.head_weight.device)
        past = model(ids, None, None, num_logits_to_keep=1).past_key_values
    return model_intermediates(model, new, past)


def _keep_output(
    found: Intermediates, place: Place, module: nn.Module, inputs: Any, output: Tensor
) -> None:
    del module, inputs
    found[place] = flat(output[0])


def _keep_input(
    found: Intermediates, place: Place, module: nn.Module, inputs: tuple[Tensor]
) -> None:
    del module
    found[place] = flat(inputs[0][0])


def flat(value: Tensor) -> Tensor:
    """Copy a value [T, ...] to the CPU as [T, C]."""
    return value.reshape(value.shape[0], -1).to("cpu", copy=True)


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
INTEGER_OPS = {"MatMulIntegerToFloat"}
LAYER = re.compile(r"layer_(\d+)\.")


class OnnxIntermediates:
    """A copy of a bundle's graph that also returns the outputs of its blocks, for one row.

    Raises:
        UnavailableError: the onnx package is missing.
    """

    def __init__(self, runtime: OnnxRuntime) -> None:
        try:
            import onnx
        except ImportError as error:
            raise UnavailableError(
                'naming the diverging layer needs onnx; run: pip install "gemma3-export[export]"'
            ) from error
        if runtime.uses_sliding_window_cache:  # its sibling accepts an empty cache
            sibling = runtime.with_other_cache()
            assert sibling is not None
            runtime = sibling
        self.runtime = runtime
        model = (
            onnx.load_model_from_string(runtime.graph)
            if isinstance(runtime.graph, bytes)
            else read_graph(runtime.graph)
        )
        self.names = intermediate_names(model.graph.node)
        known = {value.name for value in model.graph.output}
        model.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name)
            for name in dict.fromkeys(self.names.values())
            if name not in known
        )
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        entries = {WEIGHTS_FOLDER: str(runtime.weights_folder), **runtime.product_entries}
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=runtime.session.get_providers()
        )

    def __call__(self, before: IntArray, new: IntArray) -> Intermediates:
        """Feed ``before``, then ``new``, and return the intermediates of ``new``."""
        config, signature = self.runtime.config, self.runtime.signature
        empty = (1, config.num_key_value_heads, 0, config.head_dim)
        past = [zeros(empty, spec.dtype) for spec in signature.past]
        if len(before):
            past = self._run([spec.name for spec in signature.present], before, past, len(before))
        keys = [spec.name for spec in signature.present_keys]
        logits = signature.logits.name
        outputs = list(dict.fromkeys([*self.names.values(), *keys, logits]))
        count = len(new)
        results = self._run(outputs, new, past, len(before) + count)
        found = dict(zip(outputs, map(as_float32, results), strict=True))
        values = {place: tokens_first(found[name], count) for place, name in self.names.items()}
        for layer, name in enumerate(keys):
            key = found[name][0][:, len(before) : len(before) + count]
            values[Place(layer, ROTARY_KEY)] = flat(torch.from_numpy(key).transpose(0, 1))
        values[Place(None, "head")] = torch.from_numpy(found[logits][0])[-HEAD_TOKENS:]
        return values

    def _run(self, outputs: list[str], ids: IntArray, past: list[Any], total: int) -> list[Any]:
        signature = self.runtime.signature
        feeds: dict[str, Any] = {
            signature.input_ids.name: np.ascontiguousarray(ids[None]),
            signature.attention_mask.name: np.ones((1, total), np.int64),
        }
        feeds |= {spec.name: value for spec, value in zip(signature.past, past, strict=True)}
        if not signature.num_logits_to_keep.optional:
            feeds[signature.num_logits_to_keep.name] = np.array(0)
        return run_graph(self.session, outputs, feeds)


def intermediate_names(nodes: Any) -> dict[Place, str]:
    """Return the name of the graph value that holds each block's output."""
    layers: dict[int, list[Any]] = {}
    outside = []
    for node in nodes:
        match = LAYER.match(node.name)
        if match:
            layers.setdefault(int(match.group(1)), []).append(node)
        else:
            outside.append(node)
    names: dict[Place, str] = {}
    for layer, own in layers.items():
        names |= {Place(layer, block): name for block, name in layer_names(own).items()}
    norms = [node for node in outside if node.op_type in NORM_OPS]
    if len(norms) == 1:
        names[Place(None, "norm")] = norms[0].output[0]
    return names


def layer_names(nodes: list[Any]) -> dict[str, str]:
    """Map the blocks of one layer to value names; ``nodes`` are in execution order."""
    names: dict[str, str] = {}
    norms = [node.output[0] for node in nodes if node.op_type in NORM_OPS]
    if len(norms) == len(NORMS):
        names |= dict(zip(NORMS, norms, strict=True))
    attention = [index for index, node in enumerate(nodes) if node.op_type in ATTENTION_OPS]
    if len(attention) == 1:
        names[ATTEND] = nodes[attention[0]].output[0]
        # A graph of 8-bit products also has products that rotate.
        found = {node.op_type for node in nodes}
        kinds = INTEGER_OPS & found or PRODUCT_OPS
        after = [node for node in nodes[attention[0] :] if node.op_type in kinds]
        if len(after) >= 2:
            names["self_attn.o_proj"] = after[0].output[0]
            names["mlp"] = after[-1].output[0]
    return names


def tokens_first(array: Any, count: int) -> torch.Tensor:
    """Reshape [1, T, ...] or [1, N, T, H] (from the standard Attention operator) to [T, C]."""
    value = torch.from_numpy(np.asarray(array))[0]
    if value.ndim == 3 and value.shape[0] != count:
        value = value.transpose(0, 1)
    return flat(value)
