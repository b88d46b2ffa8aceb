"""Graph passes for ``model_windowed.onnx``: sliding-window caches and fewer nodes.

``model.onnx`` and ``model_windowed.onnx`` read the same weights and compute the same results. The
first has the operators and the cache that every consumer of such graphs knows. In the second,
GroupQueryAttention drops keys that no later query can see, so neither time nor memory grows with
the text. That needs an in-place cache that is never empty, which only this project's runtime
guarantees. Recent ONNX Runtime operators also normalize heads without moving them, and add the
residual while normalizing it.
"""

from __future__ import annotations

import onnx_ir as ir

from gemma3_export.config import Gemma3Config

__all__ = ["FuseNorms", "UseSlidingWindowCache", "has_sliding_layers"]

DOMAIN = "com.microsoft"


def has_sliding_layers(config: Gemma3Config) -> bool:
    """Return whether any layer can drop old tokens from its cache."""
    return any(config.is_sliding(layer) for layer in range(config.num_hidden_layers))


class UseSlidingWindowCache(ir.passes.InPlacePass):
    """Pass that lets attention with a local window drop keys outside of it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set ``sliding_window_cache`` on every GroupQueryAttention with a window."""
        modified = False
        for node in model.graph:
            if node.op_type != "GroupQueryAttention":
                continue
            if node.attributes["local_window_size"].as_int() > 0:
                node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", 1)
                modified = True
        return ir.passes.PassResult(model, modified)


class FuseNorms(ir.passes.InPlacePass):
    """Pass that fuses norms with the nodes around them.

    ``Reshape``, ``RMSNormalization``, ``Reshape`` of query and key heads become
    ``BranchwiseRMSNorm``. A residual ``Add`` and the norm of its sum become
    ``SkipSimplifiedLayerNormalization``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every norm whose pattern matches."""
        graph = model.graph
        modified = False
        for node in tuple(graph):
            if node.op_type == "GroupQueryAttention":
                heads = (node.attributes["num_heads"], node.attributes["kv_num_heads"])
                for value, count in zip(node.inputs, heads, strict=False):
                    modified |= fuse_head_norm(graph, value, count.as_int())
            elif node.op_type == "RMSNormalization":
                modified |= fuse_residual_norm(graph, node)
        return ir.passes.PassResult(model, modified)


def fuse_head_norm(graph: ir.Graph, value: ir.Value | None, heads: int) -> bool:
    """Fuse the norm that makes ``value`` [B, T, N*H]; return whether there was one."""
    merged = producer(value, "Reshape")
    norm = producer(merged.inputs[0], "RMSNormalization") if merged else None
    split = producer(norm.inputs[0], "Reshape") if norm else None
    if merged is None or norm is None or split is None:
        return False
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
    return True


def fuse_residual_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    """Fuse ``norm`` with the ``Add`` before it; return whether there was one."""
    addition = producer(norm.inputs[0], "Add")
    if addition is None:
        return False
    node = ir.Node(
        DOMAIN,
        "SkipSimplifiedLayerNormalization",
        [*addition.inputs, norm.inputs[1]],
        [ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())],
        num_outputs=4,  # the normalized sum, two that only training uses, the sum
        name=norm.name,
    )
    outputs = {norm.outputs[0]: node.outputs[0], addition.outputs[0]: node.outputs[3]}
    replace(graph, norm, node, outputs)
    graph.remove(addition, safe=True)
    return True


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes ``value`` if its operator is ``op_type``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node, outputs: dict[ir.Value, ir.Value]) -> None:
    """Replace the node ``old`` with ``new``, and the keys of ``outputs`` with their values."""
    graph.insert_before(old, new)
    for before, after in outputs.items():
        after.name, after.type = f"{before.name}.{new.op_type}", before.type
        before.replace_all_uses_with(after)
    graph.remove(old, safe=True)
