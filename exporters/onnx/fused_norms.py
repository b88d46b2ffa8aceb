"""Graph passes that fuse norms with the nodes around them.

:class:`FuseNorms` is for sliding-window graphs, and :class:`FuseResidualNorms`, a part of it, for
quantized graphs with growing caches. :class:`FuseBfloat16Norms` is for every graph with bfloat16
activations, which only CUDA runs: there, a step of a small model costs what its kernels cost to
start, so a layer should have few of them. It has 14 instead of 28: four products,
four norms (two of which add to the residual stream), three of attention (row lengths; head norms,
rotation and cache update; scores), split, GELU and multiplication.

N query heads, K key-value heads, H head size, D hidden size.
"""

from __future__ import annotations

import onnx_ir as ir

from gemma3_export.dtypes import ELEMENT_TYPES
from gemma3_export.runtimes.onnx.graph_rewrites import K_NORM_WEIGHT, Q_NORM_WEIGHT

__all__ = ["FuseBfloat16Norms", "FuseNorms", "FuseResidualNorms"]

DOMAIN = "com.microsoft"
BFLOAT16 = ELEMENT_TYPES["bfloat16"].onnx


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


class FuseResidualNorms(ir.passes.InPlacePass):
    """Pass that fuses each residual ``Add`` with the norm of its sum, as :class:`FuseNorms` does.

    Quantized products amplify the rounding in which this differs from separate nodes, by as much as
    0.66 in the logits of the int8 270M. Both graphs of a quantized variant therefore have these
    nodes, and compute the same bits within the window. (Fusing the norms of heads changes no bit.)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every norm whose pattern matches."""
        norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
        modified = [fuse_residual_norm(model.graph, node) for node in norms]
        return ir.passes.PassResult(model, any(modified))


class FuseBfloat16Norms(ir.passes.InPlacePass):
    """Pass that fuses the norms of a graph whose residual stream is bfloat16.

    ``Cast``, ``RMSNormalization``, ``Cast`` become ``BranchwiseRMSNorm``, which computes in
    float32. If the input is a residual ``Add``, both become
    ``SkipSimplifiedLayerNormalization``. The norms of query and key heads become inputs of
    ``GroupQueryAttention``, which then takes the packed projection as it is. Those two operators
    take their scales in bfloat16, rounded once.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every norm whose pattern matches."""
        graph = model.graph
        modified = False
        for op_type, fuse in (
            ("RMSNormalization", fuse_casts),
            ("GroupQueryAttention", fuse_packed_attention),
            ("BranchwiseRMSNorm", fuse_bfloat16_residual_norm),
        ):
            for node in tuple(graph):
                if node.op_type == op_type:
                    modified |= fuse(graph, node)
        if modified:
            graph.sort()  # scales are now needed earlier
        return ir.passes.PassResult(model, modified)


def fuse_casts(graph: ir.Graph, norm: ir.Node) -> bool:
    """Fuse ``norm`` with the casts to float32 before it and to bfloat16 after it."""
    widened = producer(norm.inputs[0], "Cast")
    narrowed = norm.outputs[0].consumers()
    if widened is None or len(narrowed) != 1 or narrowed[0].op_type != "Cast":
        return False
    attributes = [ir.AttrInt64("num_branches", 1), epsilon_of(norm)]
    inputs = [widened.inputs[0], norm.inputs[1]]
    node = ir.Node(DOMAIN, "BranchwiseRMSNorm", inputs, attributes, num_outputs=1, name=norm.name)
    replace(graph, narrowed[0], node, {narrowed[0].outputs[0]: node.outputs[0]})
    graph.remove([norm, widened], safe=True)
    return True


def fuse_packed_attention(graph: ir.Graph, attention: ir.Node) -> bool:
    """Move the split of the packed projection and the norms of its heads into ``attention``."""
    split = producer(attention.inputs[2], "Split")
    if split is None:
        return False
    norms, moved = [], []
    for value, part in zip(attention.inputs[:2], split.outputs, strict=False):
        merged = producer(value, "Reshape")
        norm = producer(merged.inputs[0], "BranchwiseRMSNorm") if merged else None
        heads = producer(norm.inputs[0], "Reshape") if norm else None
        if merged is None or norm is None or heads is None or heads.inputs[0] is not part:
            return False
        norms.append(norm)
        moved += [merged, norm, heads]
    attention.resize_inputs(K_NORM_WEIGHT + 1)
    packed: list[ir.Value | None] = [split.inputs[0], None, None]
    for index, value in enumerate(packed):
        attention.replace_input_with(index, value)
    for index, norm in zip((Q_NORM_WEIGHT, K_NORM_WEIGHT), norms, strict=True):
        attention.replace_input_with(index, bfloat16_scale(graph, norm, before=attention))
    attention.attributes["qk_norm_epsilon"] = ir.AttrFloat32(
        "qk_norm_epsilon", norms[0].attributes["epsilon"].as_float()
    )
    graph.remove([*moved, split], safe=True)
    return True


def fuse_bfloat16_residual_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    """Fuse ``norm`` with the ``Add`` before it; a ``Slice`` between them moves behind the norm."""
    sliced = producer(norm.inputs[0], "Slice")
    addition = producer(sliced.inputs[0] if sliced else norm.inputs[0], "Add")
    if addition is None:
        return False
    node = ir.Node(
        DOMAIN,
        "SkipSimplifiedLayerNormalization",
        [*addition.inputs, bfloat16_scale(graph, norm, before=addition)],
        [epsilon_of(norm)],
        num_outputs=4,  # the normalized sum, two that only training uses, the sum
        name=norm.name,
    )
    normed = node.outputs[0]
    graph.insert_before(addition, node)
    if sliced is not None:
        slice_normed = ir.Node(
            "", "Slice", [normed, *sliced.inputs[1:]], num_outputs=1, name=sliced.name
        )
        replace(graph, norm, slice_normed, {norm.outputs[0]: slice_normed.outputs[0]})
        graph.remove(sliced, safe=True)
    else:
        replace(graph, norm, None, {norm.outputs[0]: normed})
    replace(graph, addition, None, {addition.outputs[0]: node.outputs[3]})
    return True


def bfloat16_scale(graph: ir.Graph, norm: ir.Node, *, before: ir.Node) -> ir.Value:
    """Return the scale of ``norm`` rounded to bfloat16; runtimes fold the cast on load."""
    scale = norm.inputs[1]
    assert scale is not None
    node = ir.Node("", "Cast", [scale], [ir.AttrInt64("to", BFLOAT16)], num_outputs=1)
    node.name, node.outputs[0].name = f"{norm.name}.scale", f"{scale.name}.bfloat16"
    graph.insert_before(before, node)
    return node.outputs[0]


def epsilon_of(norm: ir.Node) -> ir.Attr:
    """Return the attribute ``epsilon`` of ``norm``."""
    return ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())


def fuse_head_norm(graph: ir.Graph, value: ir.Value | None, heads: int) -> bool:
    """Fuse the norm that makes ``value`` [B, T, N*H]; return whether there was one."""
    merged = producer(value, "Reshape")
    norm = producer(merged.inputs[0], "RMSNormalization") if merged else None
    split = producer(norm.inputs[0], "Reshape") if norm else None
    if merged is None or norm is None or split is None:
        return False
    attributes = [ir.AttrInt64("num_branches", heads), epsilon_of(norm)]
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
        [epsilon_of(norm)],
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


def replace(
    graph: ir.Graph, old: ir.Node, new: ir.Node | None, outputs: dict[ir.Value, ir.Value]
) -> None:
    """Replace the keys of ``outputs`` with their values, and ``old`` with ``new``.

    ``new`` is None if the node that makes the values is part of the graph already.
    """
    if new is not None:
        graph.insert_before(old, new)
    for before, after in outputs.items():
        maker = after.producer()
        assert maker is not None
        after.name, after.type = f"{before.name}.{maker.op_type}", before.type
        before.replace_all_uses_with(after)
    graph.remove(old, safe=True)
