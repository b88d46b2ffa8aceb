"""Rewrite graphs so that the CPU runs them: bfloat16 in float32, and 8-bit products in float32.

ONNX Runtime has no bfloat16 kernels on the CPU. The graph is rewritten to compute in float32 and
to round to bfloat16 wherever the original does: weights are read as the bfloat16 numbers that they
are, and what a product, an activation or the attention gives is rounded as the GPU's kernel rounds
its result. Only the cache is kept in float32: its keys are not rounded after their rotation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma3_export.errors import InputError, UnavailableError

__all__ = ["read_graph", "upcast_to_float32", "weights_folder", "without_activation_quantization"]

# These hand numbers on; a result of any other operator is a new number, to be rounded.
MOVES = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Transpose"}
NOT_FLOAT = {"Shape", "Size", "ArgMax"}
WIDE = "__float32"
EXACT = "__unrounded"


def upcast_to_float32(path: Path) -> bytes:
    """The graph at ``path`` with float32 in place of bfloat16; weights stay in their file.

    Raises:
        UnavailableError: the package ``onnx`` is missing.
        InputError: the graph cannot be read.
    """
    model = read_graph(path)
    import onnx

    Upcast(onnx, model.graph).run()
    serialized: bytes = model.SerializeToString()
    return serialized


def read_graph(path: Path) -> Any:
    """The graph's ``ModelProto``, without its weights, whose files have their real names.

    Raises:
        UnavailableError: the package ``onnx`` is missing.
        InputError: the graph cannot be read.
    """
    try:
        import onnx
    except ImportError as error:
        raise UnavailableError(
            "this graph must be rewritten before the CPU can run it this way, which needs the "
            "package onnx; run: pip install onnx, or pass --device cuda, or export with "
            "--dtype fp32"
        ) from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises what it likes
        raise InputError(f"{path} cannot be read: {error}; export the bundle anew") from error
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":  # ONNX Runtime refuses links out of the folder
                entry.value = (path.parent / entry.value).resolve().name
    return model


def weights_folder(data: Path) -> Path:
    """Where the files lie that a graph of :func:`read_graph` names; ``data`` is one of them."""
    return data.resolve().parent


class Upcast:
    """The rewriting of one graph, in place."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.half, self.single = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
        self.was_half: set[str] = set()  # names whose values the original holds in bfloat16
        self.nodes: list[Any] = []

    def run(self) -> None:
        """Rewrite weights, interface and nodes."""
        renamed = {}
        for tensor in self.graph.initializer:
            if tensor.data_type == self.half:
                renamed[tensor.name] = tensor.name + WIDE
                self._cast(tensor.name, tensor.name + WIDE, self.single)
                self.was_half.add(tensor.name + WIDE)
        for value in (*self.graph.input, *self.graph.output):
            kind = value.type.tensor_type
            if kind.elem_type == self.half:
                kind.elem_type = self.single
                self.was_half.add(value.name)
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            self._rewrite(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]  # their types are the original's

    def _rewrite(self, node: Any) -> None:
        if node.op_type == "Cast":
            target = next(a for a in node.attribute if a.name == "to")
            if target.i == self.half:
                self._round(node.input[0], node.output[0])
            else:
                self.nodes.append(node)
            return
        self.nodes.append(node)
        if node.op_type in NOT_FLOAT or self.was_half.isdisjoint(node.input):
            return
        if node.op_type in MOVES:
            self.was_half.update(node.output)
            return
        interface = {value.name for value in self.graph.output}
        for index, name in enumerate(list(node.output)):
            if name in interface:  # the cache, which lies where the caller has put it
                self.was_half.add(name)
                continue
            node.output[index] = name + EXACT
            self._round(name + EXACT, name)

    def _round(self, source: str, target: str) -> None:
        """``target`` is ``source``, rounded to bfloat16 and held in float32."""
        self._cast(source, target + "__bfloat16", self.half)
        self._cast(target + "__bfloat16", target, self.single)
        self.was_half.add(target)

    def _cast(self, source: str, target: str, kind: int) -> None:
        node = self.onnx.helper.make_node("Cast", [source], [target], name=f"to {target}", to=kind)
        self.nodes.append(node)


def without_activation_quantization(path: Path) -> bytes:
    """The graph at ``path`` whose quantised products take their inputs as they are.

    Raises:
        UnavailableError: the package ``onnx`` is missing.
        InputError: the graph cannot be read.
    """
    model = read_graph(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    serialized: bytes = model.SerializeToString()
    return serialized
