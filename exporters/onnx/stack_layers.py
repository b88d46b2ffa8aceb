"""Repeat traced layers to the model's full depth.

Tracing costs seconds a layer, and all layers of one kind are the same graph with other weights. So
a model with one layer of each kind is traced, its layers are cut out at boundary markers, and the
cuttings are stacked as ``layer_types`` says: a 62-layer model traces as fast as a 2-layer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor
from torch.onnx import ops

from gemma3_export.bundle import Signature
from gemma3_export.config import Gemma3Config, LayerType

__all__ = ["layer_boundary", "one_layer_of_each_kind", "stack_layers"]

BOUNDARY_DOMAIN, BOUNDARY_OP = "gemma3_export", "LayerBoundary"


def layer_boundary(x: Tensor) -> Tensor:
    """Mark a layer's input, or the last layer's output, in a trace; computes nothing."""
    return ops.symbolic(
        f"{BOUNDARY_DOMAIN}::{BOUNDARY_OP}", [x], dtype=x.dtype, shape=x.shape, version=1
    )


def one_layer_of_each_kind(config: Gemma3Config) -> tuple[LayerType, ...]:
    """The kinds of layer, in order of first appearance."""
    return tuple(dict.fromkeys(config.layer_types))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutting:
    """One traced layer: nodes, and the values through which it meets the rest of the graph."""

    index: int
    nodes: list[ir.Node]
    x_in: ir.Value
    x_out: ir.Value
    past: tuple[ir.Value, ...]
    present: tuple[ir.Value, ...]


def stack_layers(graph: ir.Graph, config: Gemma3Config, signature: Signature) -> None:
    """Turn the trace of one layer of each kind into the whole model, in place.

    Args:
        graph: with boundary markers; weights are initializers without a value.
        config: the whole model.
        signature: the whole model's inputs and outputs.
    """
    kinds = one_layer_of_each_kind(config)
    markers = [node for node in graph if node.op_type == BOUNDARY_OP]
    assert len(markers) == len(kinds) + 1, "one boundary before each layer and one after the last"
    cuttings = {
        kind: cut_layer(graph, markers[index], markers[index + 1], index)
        for index, kind in enumerate(kinds)
    }
    end = markers[-1]
    x = only_input(markers[0])
    past_inputs: list[ir.Value] = []
    present_outputs: list[ir.Value] = []
    for layer, kind in enumerate(config.layer_types):
        cutting = cuttings[kind]
        past = [ir.Value(name=spec.name) for spec in signature.past[2 * layer : 2 * layer + 2]]
        replaced = {cutting.x_in: x, **dict(zip(cutting.past, past, strict=True))}
        copy_nodes(graph, cutting, layer, replaced, before=end)
        x = replaced[cutting.x_out]
        present = [replaced[value] for value in cutting.present]
        for value, spec in zip(present, signature.present[2 * layer : 2 * layer + 2], strict=True):
            value.name = spec.name
        past_inputs += past
        present_outputs += present
    end.outputs[0].replace_all_uses_with(x)
    set_interface(graph, past_inputs, present_outputs)
    remove_cuttings(graph, cuttings.values(), markers)
    graph.opset_imports.pop(BOUNDARY_DOMAIN, None)  # no runtime knows it


def cut_layer(graph: ir.Graph, start: ir.Node, end: ir.Node, index: int) -> Cutting:
    """Find what belongs to one traced layer alone.

    A node is the layer's own when it depends on the layer's input, past or weights; what does not
    (masks, angles, extents) is shared by all layers and stays where it is.
    """
    past = tuple(graph.inputs[2 + 2 * index : 4 + 2 * index])
    present = tuple(graph.outputs[1 + 2 * index : 3 + 2 * index])
    own_values = {start.outputs[0], *past}
    own_values |= {
        value for name, value in graph.initializers.items() if name.startswith(layer_prefix(index))
    }
    nodes = []
    for node in graph:
        if node is end or node.op_type == BOUNDARY_OP:
            continue
        if any(value in own_values for value in node.inputs):
            nodes.append(node)
            own_values.update(node.outputs)
    return Cutting(
        index=index,
        nodes=nodes,
        x_in=start.outputs[0],
        x_out=only_input(end),
        past=past,
        present=present,
    )


def copy_nodes(
    graph: ir.Graph,
    cutting: Cutting,
    layer: int,
    replaced: dict[ir.Value, ir.Value],
    *,
    before: ir.Node,
) -> None:
    """Insert copies of a cutting's nodes as layer ``layer``; ``replaced`` learns the new values."""
    for node in cutting.nodes:
        inputs = [
            None if value is None else layer_value(graph, value, cutting.index, layer, replaced)
            for value in node.inputs
        ]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"layer_{layer}.{node.name}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"layer_{layer}.{old.name}"
            new.type, new.shape = old.type, None
            replaced[old] = new
        graph.insert_before(before, copy)


def layer_value(
    graph: ir.Graph,
    value: ir.Value,
    traced: int,
    layer: int,
    replaced: Mapping[ir.Value, ir.Value],
) -> ir.Value:
    """What stands in layer ``layer`` where the traced layer has ``value``."""
    if value in replaced:
        return replaced[value]
    assert value.name is not None
    if not value.is_initializer() or not value.name.startswith(layer_prefix(traced)):
        return value  # shared by all layers
    name = layer_prefix(layer) + value.name.removeprefix(layer_prefix(traced))
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(name=name, type=value.type)
    return graph.initializers[name]


def set_interface(graph: ir.Graph, past: Iterable[ir.Value], present: Iterable[ir.Value]) -> None:
    """Put the full depth's cache among the graph's inputs and outputs."""
    input_ids, attention_mask, *_, num_logits_to_keep = graph.inputs
    graph.inputs[:] = [input_ids, attention_mask, *past, num_logits_to_keep]
    graph.outputs[:] = [graph.outputs[0], *present]


def remove_cuttings(
    graph: ir.Graph, cuttings: Iterable[Cutting], markers: Iterable[ir.Node]
) -> None:
    """Drop the traced layers, now that their copies stand in the graph."""
    graph.remove([*(node for cutting in cuttings for node in cutting.nodes), *markers], safe=True)


def layer_prefix(layer: int) -> str:
    """What the names of a layer's weights begin with."""
    return f"model.layers.{layer}."


def only_input(node: ir.Node) -> ir.Value:
    """The input of a boundary marker."""
    (value,) = node.inputs
    assert value is not None
    return value
