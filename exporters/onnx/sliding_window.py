"""The sibling of a fused graph, for our own runtime: bounded caches and fewer nodes.

Both graphs read the same weights and compute the same. ``model.onnx`` has operators and a cache
that every consumer of such graphs knows. In ``model_windowed.onnx`` GroupQueryAttention lets go of
keys that no query will see again, so neither its time nor its memory grows with the text; it needs
a cache that lies in place and is never empty, which only our own runtime promises. Newer operators
of ONNX Runtime normalise heads where they lie, and add the residual as they normalise it.
"""

from __future__ import annotations

import onnx_ir as ir

from gemma3_export.config import Gemma3Config

__all__ = ["has_windows", "make_windowed"]

DOMAIN = "com.microsoft"


def has_windows(config: Gemma3Config) -> bool:
    """Whether a layer's cache can let go of tokens."""
    return any(config.is_sliding(layer) for layer in range(config.num_hidden_layers))


def make_windowed(graph: ir.Graph, config: Gemma3Config) -> None:
    """Make ``graph`` the windowed one, in place; its signature is still to be declared."""
    heads = (config.num_attention_heads, config.num_key_value_heads)
    for node in tuple(graph):
        if node.op_type == "GroupQueryAttention":
            if node.attributes["local_window_size"].as_int() > 0:
                node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", 1)
            for value, count in zip(node.inputs, heads, strict=False):
                normalise_in_place(graph, value, count)
        elif node.op_type == "RMSNormalization":
            add_and_normalise(graph, node)


def normalise_in_place(graph: ir.Graph, value: ir.Value | None, heads: int) -> None:
    """``Reshape``, ``RMSNormalization``, ``Reshape`` of [B, T, N*H] as one node."""
    merged = producer(value, "Reshape")
    norm = producer(merged.inputs[0], "RMSNormalization") if merged else None
    split = producer(norm.inputs[0], "Reshape") if norm else None
    if merged is None or norm is None or split is None:
        return
    attributes = [
        ir.AttrInt64("num_branches", heads),
        ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float()),
    ]
    node = ir.Node(
        DOMAIN,
        "BranchwiseRMSNorm",
        [split.inputs[0], norm.inputs[1]],
        attributes,
        num_outputs=1,
        name=norm.name,
    )
    replace(graph, merged, node, {merged.outputs[0]: node.outputs[0]})
    for old in (norm, split):
        graph.remove(old, safe=True)


def add_and_normalise(graph: ir.Graph, norm: ir.Node) -> None:
    """``Add`` and the ``RMSNormalization`` of its sum as one node."""
    addition = producer(norm.inputs[0], "Add")
    if addition is None:
        return
    node = ir.Node(
        DOMAIN,
        "SkipSimplifiedLayerNormalization",
        [*addition.inputs, norm.inputs[1]],
        [ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())],
        num_outputs=4,  # normalised, two that are of no use in inference, the sum
        name=norm.name,
    )
    outputs = {norm.outputs[0]: node.outputs[0], addition.outputs[0]: node.outputs[3]}
    replace(graph, norm, node, outputs)
    graph.remove(addition, safe=True)


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value``, if it is of that kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node, outputs: dict[ir.Value, ir.Value]) -> None:
    """Put ``new`` in the place of ``old``, and its outputs in that of others."""
    graph.insert_before(old, new)
    for before, after in outputs.items():
        after.name, after.type = f"{before.name}.{new.op_type}", before.type
        before.replace_all_uses_with(after)
    graph.remove(old, safe=True)
