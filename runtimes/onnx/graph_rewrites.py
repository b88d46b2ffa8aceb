"""Rewrite graphs for the CPU: bfloat16 emulated in float32, and products without 8-bit activations.

ONNX Runtime has no bfloat16 kernels on the CPU. The graph is rewritten to compute in float32 and to
round to bfloat16 wherever the original does: weights keep their bfloat16 values, and the results of
products, norms, activations and attention are rounded as a GPU kernel rounds them. Fused operators
are taken apart, since the CPU's attention does not normalize heads. Only the cache stays in
float32: keys are not rounded after their rotation.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from gemma3_export.errors import InputError, UnavailableError

__all__ = [
    "K_NORM_WEIGHT",
    "Q_NORM_WEIGHT",
    "read_graph",
    "upcast_to_float32",
    "weights_folder",
    "without_activation_quantization",
]

# These operators only move numbers; the result of any other is a new number, to be rounded.
MOVES = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Transpose"}
NOT_FLOAT = {"Shape", "Size", "ArgMax"}
Q_NORM_WEIGHT, K_NORM_WEIGHT = 14, 15  # inputs of GroupQueryAttention
WIDE = "__float32"
EXACT = "__unrounded"
PARTS = 3  # 8-bit numbers in whose sum activations are as exact as in float32
FINER = 254.0  # the remainder is at most half a step, or 127 codes of 1/254 step
FLOAT_BLOCK = 128  # of inputs, at most, when a whole row is read as blocks


def upcast_to_float32(path: Path) -> bytes:
    """Return the graph at ``path`` with float32 for bfloat16; weights stay in their file.

    Raises:
        UnavailableError: the package ``onnx`` is missing.
        InputError: the graph cannot be read.
    """
    model = read_graph(path)
    import onnx

    SeparateNorms(onnx, model.graph).run()
    Upcast(onnx, model.graph).run()
    serialized: bytes = model.SerializeToString()
    return serialized


def read_graph(path: Path) -> Any:
    """Return the graph's ``ModelProto``; its external data files carry their resolved names.

    Raises:
        UnavailableError: the package ``onnx`` is missing.
        InputError: the graph cannot be read.
    """
    try:
        import onnx
    except ImportError as error:
        raise UnavailableError(
            "this graph must be rewritten to run on the CPU this way, which needs the package "
            "onnx; run: pip install onnx, or pass --device cuda, or export with --dtype fp32"
        ) from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base class
        raise InputError(f"{path} cannot be read: {error}; export the bundle again") from error
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":  # ONNX Runtime rejects links out of the folder
                entry.value = (path.parent / entry.value).resolve().name
    return model


def weights_folder(data: Path) -> Path:
    """Return the folder of the files that :func:`read_graph` names; ``data`` is one of them."""
    return data.resolve().parent


class SeparateNorms:
    """Replaces fused norms of one graph in place: see the exporter's ``FuseBfloat16Norms``."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.nodes: list[Any] = []

    def run(self) -> None:
        """Rewrite every node that contains a norm."""
        separate = {
            "BranchwiseRMSNorm": self._separate_branches,
            "SkipSimplifiedLayerNormalization": self._separate_addition,
            "GroupQueryAttention": self._separate_head_norms,
        }
        for node in self.graph.node:
            separate.get(node.op_type, self.nodes.append)(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _separate_branches(self, node: Any) -> None:
        if attribute(node, "num_branches").i != 1:  # of heads, which the CPU can normalize
            self.nodes.append(node)
            return
        x, scale = node.input
        self._normalize(node.name, x, scale, node.output[0], attribute(node, "epsilon").f)

    def _separate_addition(self, node: Any) -> None:
        first, second, scale = node.input
        total = node.output[3]
        self._append("Add", f"{node.name}.add", [first, second], [total])
        self._normalize(node.name, total, scale, node.output[0], attribute(node, "epsilon").f)

    def _separate_head_norms(self, node: Any) -> None:
        if len(node.input) <= Q_NORM_WEIGHT:
            self.nodes.append(node)
            return
        shape = next(v for v in self.graph.input if v.name == node.input[3]).type.tensor_type.shape
        head_dim = shape.dim[3].dim_value
        heads = [attribute(node, name).i for name in ("num_heads", "kv_num_heads", "kv_num_heads")]
        parts = [f"{node.name}.{part}" for part in "qkv"]
        sizes = self._constant("sizes", [count * head_dim for count in heads])
        self._append("Split", f"{node.name}.split", [node.input[0], sizes], parts, axis=-1)
        epsilon = attribute(node, "qk_norm_epsilon").f
        split, merged = [0, 0, -1, head_dim], [0, 0, -1]
        for index, (part, weight) in enumerate(
            zip(parts, (Q_NORM_WEIGHT, K_NORM_WEIGHT), strict=False)
        ):
            names = [f"{part}.{step}" for step in ("heads", "norm", "merged")]
            scale = node.input[weight]
            self._append("Reshape", names[0], [part, self._constant("split", split)], names[:1])
            self._normalize(names[1], names[0], scale, names[1], epsilon)
            target = self._constant("merged", merged)
            self._append("Reshape", names[2], [names[1], target], names[2:])
            node.input[index] = names[2]
        node.input[2] = parts[2]
        del node.input[Q_NORM_WEIGHT:]
        while not node.input[-1]:
            del node.input[-1]
        node.attribute.remove(attribute(node, "qk_norm_epsilon"))
        self.nodes.append(node)

    def _normalize(self, name: str, x: str, scale: str, output: str, epsilon: float) -> None:
        self._append("RMSNormalization", name, [x, scale], [output], epsilon=epsilon, axis=-1)

    def _append(
        self, operator: str, name: str, inputs: list[str], outputs: list[str], **attributes: Any
    ) -> None:
        make = self.onnx.helper.make_node
        self.nodes.append(make(operator, inputs, outputs, name=name, **attributes))

    def _constant(self, name: str, values: list[int]) -> str:
        """Return the name of an initializer with ``values``, which is added once."""
        name = f"separated.{name}"
        if all(tensor.name != name for tensor in self.graph.initializer):
            kind = self.onnx.TensorProto.INT64
            tensor = self.onnx.helper.make_tensor(name, kind, [len(values)], values)
            self.graph.initializer.append(tensor)
        return name


def attribute(node: Any, name: str) -> Any:
    """Return the attribute ``name`` of ``node``."""
    return next(found for found in node.attribute if found.name == name)


class Upcast:
    """Rewrites one graph in place."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.half, self.single = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
        self.was_half: set[str] = set()  # names of values that are bfloat16 in the original
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
        del self.graph.value_info[:]  # they describe the original types

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
            if name in interface:  # the cache, in memory that the caller has bound
                self.was_half.add(name)
                continue
            node.output[index] = name + EXACT
            self._round(name + EXACT, name)

    def _round(self, source: str, target: str) -> None:
        """Set ``target`` to ``source`` rounded to bfloat16, as float32."""
        self._cast(source, target + "__bfloat16", self.half)
        self._cast(target + "__bfloat16", target, self.single)
        self.was_half.add(target)

    def _cast(self, source: str, target: str, kind: int) -> None:
        node = self.onnx.helper.make_node("Cast", [source], [target], name=f"to {target}", to=kind)
        self.nodes.append(node)


def without_activation_quantization(path: Path) -> bytes:
    """Return the graph at ``path`` with quantized products of activations in float32.

    Raises:
        UnavailableError: the package ``onnx`` is missing.
        InputError: the graph cannot be read.
    """
    model = read_graph(path)
    import onnx

    FloatProducts(onnx, model.graph).run()
    FineProducts(onnx, model.graph).run()
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    serialized: bytes = model.SerializeToString()
    return serialized


class ProductRewrite:
    """Replaces the nodes of one operator in a graph, in place."""

    operator: ClassVar[str]

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.producer = {name: node for node in graph.node for name in node.output}
        self.nodes: list[Any] = []

    def run(self) -> None:
        """Rewrite every product."""
        for node in self.graph.node:
            if node.op_type == self.operator:
                self._replace(node)
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _replace(self, node: Any) -> None:
        raise NotImplementedError


class FloatProducts(ProductRewrite):
    """Replaces ``MatMulInteger`` of one graph in place: see the exporter's ``IntegerProducts``.

    ``W @ Transpose(Cast(Round(x) + 128))`` becomes ``Transpose(MatMulNBits(x, W))``, which reads
    the same codes and leaves ``x`` as it is.
    """

    operator = "MatMulInteger"

    def __init__(self, onnx: Any, graph: Any) -> None:
        super().__init__(onnx, graph)
        self.weights = {tensor.name: tensor for tensor in graph.initializer}

    def run(self) -> None:
        """Rewrite every product."""
        super().run()
        del self.graph.value_info[:]  # they describe the integers

    def _replace(self, node: Any) -> None:
        make, onnx = self.onnx.helper.make_node, self.onnx
        codes, columns, *_ = node.input
        transposed = self.producer[columns]
        shifted = self.producer[self.producer[transposed.input[0]].input[0]]
        rounded = self.producer[shifted.input[0]]
        weight = self.weights[codes]
        rows, inputs = weight.dims
        block = math.gcd(inputs, FLOAT_BLOCK)
        blocks, scales, product = (f"{codes}{part}" for part in (".blocks", ".ones", ".product"))
        shared = next((t for t in self.graph.initializer if t.name == blocks), None)
        if shared is None:  # the same bytes in another shape
            shared = self.graph.initializer.add()
            shared.CopyFrom(weight)
            shared.name = blocks
            shared.dims[:] = [rows, inputs // block, block]
        shape = onnx.helper.make_tensor(
            f"{scales}.shape", onnx.TensorProto.INT64, [2], [rows, inputs // block]
        )
        self.graph.initializer.append(shape)
        one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
        attributes = {"K": inputs, "N": rows, "bits": 8, "block_size": block, "accuracy_level": 0}
        self.nodes += [
            make("ConstantOfShape", [shape.name], [scales], name=scales, value=one),
            make(
                "MatMulNBits",
                [rounded.input[0], blocks, scales],
                [product],
                name=product,
                domain="com.microsoft",
                **attributes,
            ),
            make(
                "Transpose",
                [product],
                list(node.output),
                name=node.name,
                perm=list(attribute(transposed, "perm").ints),
            ),
        ]
        for reader in self.graph.node:  # of the product: no longer an integer
            if reader.op_type == "Cast" and reader.input[0] == node.output[0]:
                reader.op_type = "Identity"
                del reader.attribute[:]


class FineProducts(ProductRewrite):
    """Refines ``MatMulIntegerToFloat`` of one graph in place: see ``ColumnProducts``.

    What rounding to 8 bits leaves of the activations is rounded to 8 bits as well, twice. One call
    multiplies all three parts, and their sum is as exact as a product in float32. The kernel reads
    the weights as in the graph that is shipped, without a copy in float32.

    Shapes: P parts, B batch rows, T tokens, K inputs, N outputs.
    """

    operator = "MatMulIntegerToFloat"

    def _replace(self, node: Any) -> None:
        codes, _, scale, *_ = node.input
        quantized = self.producer[codes]
        rest, _, zeros = quantized.input
        rows = {
            item.name: self.onnx.helper.get_attribute_value(item) for item in quantized.attribute
        }
        finer = self._constant("finer", [FINER], self.onnx.TensorProto.FLOAT)
        axis = self._constant("axis", [0], self.onnx.TensorProto.INT64)
        all_codes, all_scales = [], []
        for part in range(PARTS):
            if part:
                inputs = [codes, scale, zeros]
                whole = self._append("DequantizeLinear", node, f"whole{part}", inputs, **rows)
                rest = self._append("Sub", node, f"rest{part}", [rest, whole])
                scale = self._append("Div", node, f"scale{part}", [scale, finer])
                inputs = [rest, scale, zeros]
                codes = self._append("QuantizeLinear", node, f"codes{part}", inputs, **rows)
            all_codes.append(self._append("Unsqueeze", node, f"part{part}", [codes, axis]))
            all_scales.append(self._append("Unsqueeze", node, f"unit{part}", [scale, axis]))
        inputs = list(node.input)
        inputs[0] = self._append("Concat", node, "codes", all_codes, axis=0)  # [P, B, T, K]
        inputs[2] = self._append("Concat", node, "scales", all_scales, axis=0)  # [P, B, T, 1]
        del node.input[:]
        node.input.extend(inputs)
        output, node.output[0] = node.output[0], f"{node.name}.products"
        self.nodes.append(node)
        total = self.onnx.helper.make_node(
            "ReduceSum", [node.output[0], axis], [output], name=f"{node.name}.total", keepdims=0
        )
        self.nodes.append(total)

    def _append(self, operator: str, node: Any, role: str, inputs: list[str], **more: Any) -> str:
        """Append a node; return its output."""
        name = f"{node.name}.{role}"
        make = self.onnx.helper.make_node
        self.nodes.append(make(operator, inputs, [name], name=name, **more))
        return name

    def _constant(self, name: str, values: list[Any], kind: int) -> str:
        """Return the name of an initializer with ``values``, which is added once."""
        name = f"fine_products.{name}"
        if all(tensor.name != name for tensor in self.graph.initializer):
            tensor = self.onnx.helper.make_tensor(name, kind, [len(values)], values)
            self.graph.initializer.append(tensor)
        return name
