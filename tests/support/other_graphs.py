"""Our own tiny graphs under the inputs and outputs that other exporters give theirs.

Each function changes a graph in place; :func:`write_graph` writes the result as one file, which
nothing but its inputs and outputs tells from the export of another tool.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gemma3_export.bundle import Bundle
from gemma3_export.config import Gemma3Config
from tests.support.exported_bundles import VARIANTS, exported_bundle

CONFIG: Gemma3Config = VARIANTS["irregular"]
FIXED_LENGTH = 96
Change = Callable[[Any], None]  # of a ModelProto


def write_graph(path: Path, *changes: Change, target: str = "portable") -> Path:
    """Write the graph of a tiny bundle, with ``changes``, to ``path``."""
    bundle = Bundle(exported_bundle(target))
    model = onnx.load(bundle.file(bundle.graph("onnx").path))  # with its weights
    model.producer_name = "another tool"
    for change in changes:
        change(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def without_num_logits(model: Any) -> None:
    """Return all logits, as graphs of optimum do."""
    remove_input(model, "num_logits_to_keep")


def scalar_logits_to_keep(model: Any) -> None:
    """Take ``logits_to_keep``, a required scalar."""
    initializer = constant(model, "num_logits_to_keep")
    model.graph.initializer.remove(initializer)
    remove_input(model, "num_logits_to_keep")
    add_input(model, "logits_to_keep", TensorProto.INT64, [])
    shape = add_constant(model, "one_axis", np.array([1]))
    prepend(model, helper.make_node("Reshape", ["logits_to_keep", shape], ["num_logits_to_keep"]))


def named_as_tuples(model: Any) -> None:
    """Name caches as torch.onnx names tuples of tuples, and take int32 token ids and masks."""
    rename_caches(model, "past_key_values_{}_{}", "present_{}_{}", ("0", "1"))
    for name in ("input_ids", "attention_mask"):
        replace_input(model, name, f"{name}_int64")
        value = next(value for value in model.graph.input if value.name == name)
        value.type.tensor_type.elem_type = TensorProto.INT32
        cast = helper.make_node("Cast", [name], [f"{name}_int64"], to=TensorProto.INT64)
        prepend(model, cast)


def as_transformers_exports(model: Any) -> None:
    """Name caches as ``transformers.exporters`` does; take positions, and the window unused."""
    without_num_logits(model)
    names = ("keys", "values")
    rename_caches(model, "input.cache.layers.{}.{}", "output.cache.layers.{}.{}", names)
    add_input(model, "position_ids", TensorProto.INT64, ["batch", "sequence"])
    replace_input(model, positions(model).output[0], "position_ids")
    for layer in range(CONFIG.num_hidden_layers):
        if CONFIG.is_sliding(layer):
            window = f"cache.layers.{layer}._sliding_window_tensor"
            add_input(model, f"input.{window}", TensorProto.INT64, [])
            add_output(model, f"output.{window}", TensorProto.INT64, [])
            node = helper.make_node("Identity", [f"input.{window}"], [f"output.{window}"])
            model.graph.node.append(node)


def with_half_caches(model: Any) -> None:
    """Take and return keys and values in float16, and compute in float32."""
    for value in list(model.graph.input):
        if value.name.startswith("past_key_values"):
            replace_input(model, value.name, f"{value.name}.wide")
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            cast = helper.make_node("Cast", [value.name], [f"{value.name}.wide"], to=1)
            prepend(model, cast)
    for value in list(model.graph.output):
        if value.name.startswith("present"):
            replace_output(model, value.name, f"{value.name}.wide")
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            cast = helper.make_node("Cast", [f"{value.name}.wide"], [value.name], to=10)
            model.graph.node.append(cast)


def with_fixed_caches(model: Any) -> None:
    """Take and return buffers of fixed length, which begin with the tokens that the mask counts."""
    without_num_logits(model)
    ends = [add_constant(model, name, np.array([n])) for name, n in (("zero", 0), ("two", 2))]
    length = add_constant(model, "fixed_length", np.array([FIXED_LENGTH]))
    axes = add_constant(model, "sequence_axis", np.array([2]))
    first = [
        helper.make_node("Shape", ["attention_mask"], ["mask_length"], start=1, end=2),
        helper.make_node("Shape", ["input_ids"], ["new_length"], start=1, end=2),
        helper.make_node("Sub", ["mask_length", "new_length"], ["past_length"]),
        helper.make_node("Sub", [length, "mask_length"], ["free_length"]),
        helper.make_node("Concat", [ends[0]] * 6 + ["free_length", ends[0]], ["pads"], axis=0),
    ]
    for value in list(model.graph.input):
        if value.name.startswith("past_key_values"):
            replace_input(model, value.name, f"{value.name}.held")
            value.type.tensor_type.shape.dim[2].dim_value = FIXED_LENGTH
            inputs = [value.name, ends[0], "past_length", axes]
            first.append(helper.make_node("Slice", inputs, [f"{value.name}.held"]))
    for node in reversed(first):
        prepend(model, node)
    for value in list(model.graph.output):
        if value.name.startswith("present"):
            replace_output(model, value.name, f"{value.name}.held")
            value.type.tensor_type.shape.dim[2].dim_value = FIXED_LENGTH
            node = helper.make_node("Pad", [f"{value.name}.held", "pads"], [value.name])
            model.graph.node.append(node)


def one_token_at_a_time(model: Any) -> None:
    """Declare steps of one token."""
    without_num_logits(model)
    for value in model.graph.input:
        if value.name == "input_ids":
            value.type.tensor_type.shape.dim[1].dim_value = 1


def without_window(model: Any) -> None:
    """Let sliding layers attend to the whole text: a window longer than any text."""
    (less,) = (node for node in model.graph.node if node.op_type == "Less")
    set_constant(model, less.input[1], np.array(10_000))


def with_rounded_embedding_scale(model: Any) -> None:
    """Round sqrt(hidden_size) to two digits, as a builder of another tool does."""
    (gather,) = (node for node in model.graph.node if node.op_type == "Gather")
    (scale,) = (node for node in model.graph.node if node.input[0] == gather.output[0])
    set_constant(model, scale.input[1], np.float32(round(CONFIG.hidden_size**0.5, 2)))


def positions(model: Any) -> Any:
    """Return the node that computes the positions of new tokens from the mask."""
    (clip,) = (node for node in model.graph.node if node.op_type == "Clip")
    nodes = [node for node in model.graph.node if clip.output[0] in node.input]
    return next(node for node in nodes if node.op_type == "Slice")


def rename_caches(model: Any, past: str, present: str, kinds: tuple[str, str]) -> None:
    """Rename the inputs and outputs of every layer."""
    for layer in range(CONFIG.num_hidden_layers):
        for kind, name in zip(("key", "value"), kinds, strict=True):
            old, new = f"past_key_values.{layer}.{kind}", past.format(layer, name)
            replace_input(model, old, new)
            next(value for value in model.graph.input if value.name == old).name = new
            old, new = f"present.{layer}.{kind}", present.format(layer, name)
            replace_output(model, old, new)
            next(value for value in model.graph.output if value.name == old).name = new


def replace_input(model: Any, old: str, new: str) -> None:
    """Let every node take ``new`` where it took ``old``."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def replace_output(model: Any, old: str, new: str) -> None:
    """Rename a value, wherever it is returned or taken."""
    replace_input(model, old, new)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new


def prepend(model: Any, node: Any) -> None:
    model.graph.node.insert(0, node)


def add_input(model: Any, name: str, kind: int, shape: list[Any]) -> None:
    model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def add_output(model: Any, name: str, kind: int, shape: list[Any]) -> None:
    model.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def remove_input(model: Any, name: str) -> None:
    """Remove an input; its default, if it has one, becomes a constant."""
    model.graph.input.remove(next(value for value in model.graph.input if value.name == name))


def constant(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def add_constant(model: Any, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def set_constant(model: Any, name: str, value: Any) -> None:
    """Replace a constant by one of the same type and shape."""
    tensor = constant(model, name)
    before = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.full_like(before, value), name))
