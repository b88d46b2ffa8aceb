"""A graph pass that repeats traced layers to the model's full depth.

Tracing takes seconds per layer, and all layers of one type are the same graph with different
weights. So the exporter traces a model with one layer of each type, cuts the layers out at boundary
markers, and stacks copies in the order of ``layer_types``: a 62-layer model traces as fast as a
2-layer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor
from torch.onnx import ops

from gemma3_export.bundle import Signature
from gemma3_export.config import Gemma3Config, LayerType

__all__ = ["StackLayers", "distinct_layer_types", "layer_boundary"]

BOUNDARY_DOMAIN, BOUNDARY_OP = "gemma3_export", "LayerBoundary"


def layer_boundary(x: Tensor) -> Tensor:
    """Mark a layer's input, or the last layer's output, in a trace; compute nothing."""
    return ops.symbolic(
        f"{BOUNDARY_DOMAIN}::{BOUNDARY_OP}", [x], dtype=x.dtype, shape=x.shape, version=1
    )


def distinct_layer_types(config: Gemma3Config) -> tuple[LayerType, ...]:
    """Return the layer types of ``config``, in order of first appearance."""
    return tuple(dict.fromkeys(config.layer_types))


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedLayer:
    """Nodes of one traced layer, and the values that connect it to the rest of the graph."""

    index: int
    nodes: list[ir.Node]
    x_in: ir.Value
    x_out: ir.Value
    past: tuple[ir.Value, ...]
    present: tuple[ir.Value, ...]


class StackLayers(ir.passes.InPlacePass):
    """Pass that turns the trace of one layer of each type into the whole model.

    A graph without boundary markers is left as it is. New weights are initializers without a value.

    Args:
        config: the whole model.
        signature: the whole model's inputs and outputs.
    """

    def __init__(self, config: Gemma3Config, signature: Signature) -> None:
        self.config, self.signature = config, signature

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert one copy per layer, then remove the traced layers and the markers."""
        graph, config, signature = model.graph, self.config, self.signature
        markers = [node for node in graph if node.op_type == BOUNDARY_OP]
        if not markers:
            return ir.passes.PassResult(model, modified=False)
        types = distinct_layer_types(config)
        assert len(markers) == len(types) + 1, "one marker before each layer, one after the last"
        traced = {
            kind: find_layer(graph, markers[index], markers[index + 1], index)
            for index, kind in enumerate(types)
        }
        end = markers[-1]
        x = only_input(markers[0])
        past_inputs: list[ir.Value] = []
        present_outputs: list[ir.Value] = []
        for index, kind in enumerate(config.layer_types):
            layer = traced[kind]
            past = [ir.Value(name=spec.name) for spec in signature.past[2 * index : 2 * index + 2]]
            replaced = {layer.x_in: x, **dict(zip(layer.past, past, strict=True))}
            copy_nodes(graph, layer, index, replaced, before=end)
            x = replaced[layer.x_out]
            present = [replaced[value] for value in layer.present]
            specs = signature.present[2 * index : 2 * index + 2]
            for value, spec in zip(present, specs, strict=True):
                value.name = spec.name
            past_inputs += past
            present_outputs += present
        end.outputs[0].replace_all_uses_with(x)
        set_interface(graph, past_inputs, present_outputs)
        originals = [node for layer in traced.values() for node in layer.nodes]
        graph.remove([*originals, *markers], safe=True)
        graph.opset_imports.pop(BOUNDARY_DOMAIN, None)  # no runtime knows it
        return ir.passes.PassResult(model, modified=True)


def find_layer(graph: ir.Graph, start: ir.Node, end: ir.Node, index: int) -> TracedLayer:
    """Return the nodes that belong to one traced layer alone.

    A node belongs to the layer if it depends on the layer's input, past or weights. All layers
    share the rest (masks, rotary angles, sizes), which stays in place.
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
    return TracedLayer(
        index=index,
        nodes=nodes,
        x_in=start.outputs[0],
        x_out=only_input(end),
        past=past,
        present=present,
    )


def copy_nodes(
    graph: ir.Graph,
    traced: TracedLayer,
    layer: int,
    replaced: dict[ir.Value, ir.Value],
    *,
    before: ir.Node,
) -> None:
    """Insert copies of a traced layer's nodes as layer ``layer``.

    ``replaced`` maps traced values to values of the new layer, and gains the copies' outputs.
    """
    for node in traced.nodes:
        inputs = [
            None if value is None else layer_value(graph, value, traced.index, layer, replaced)
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
    """Return the value of layer ``layer`` that corresponds to ``value`` of the traced layer."""
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
    """Make the cache of all layers part of the graph's inputs and outputs."""
    input_ids, attention_mask, *_, num_logits_to_keep = graph.inputs
    graph.inputs[:] = [input_ids, attention_mask, *past, num_logits_to_keep]
    graph.outputs[:] = [graph.outputs[0], *present]


def layer_prefix(layer: int) -> str:
    """Return the prefix of a layer's weight names."""
    return f"model.layers.{layer}."


def only_input(node: ir.Node) -> ir.Value:
    """Return the single input of a boundary marker."""
    (value,) = node.inputs
    assert value is not None
    return value
