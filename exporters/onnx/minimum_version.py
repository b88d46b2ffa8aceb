"""The oldest ONNX Runtime that runs a graph, and a pass that makes older ones reject it.

Until ONNX Runtime 1.23, the local window of GroupQueryAttention is one token longer than that of
Gemma: results past the window are wrong, without an error. Nothing else distinguishes 1.24 from
1.23, so :class:`RejectLongWindows` declares the operator set that 1.24 was the first to accept.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["DECOMPOSED_OPSET", "OPSETS", "RejectLongWindows", "minimum_onnxruntime"]

# Operator sets of ai.onnx that an export can have, and the first ONNX Runtime that accepts each.
OPSETS = {21: (1, 18), 23: (1, 23), 24: (1, 24)}
DECOMPOSED_OPSET = 21  # attention and norms become several nodes: their operators came with 23
FIRST_WITH_RIGHT_WINDOWS = 24
RIGHT_WINDOWS = OPSETS[FIRST_WITH_RIGHT_WINDOWS]
# Operators and attributes that need more, found by opening graphs with every release.
OPERATORS = {"BranchwiseRMSNorm": (1, 31)}
ATTRIBUTES = {"sliding_window_cache": (1, 31), "qk_norm_epsilon": (1, 31)}


class RejectLongWindows(ir.passes.InPlacePass):
    """Pass that makes a graph with sliding-window attention fail in ONNX Runtime before 1.24."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Declare the operator set, none of whose operators compute anything else."""
        is_windowed = any(map(has_window, model.graph))
        if is_windowed:
            model.graph.opset_imports[""] = FIRST_WITH_RIGHT_WINDOWS
        return ir.passes.PassResult(model, is_windowed)


def minimum_onnxruntime(model: ir.Model) -> str:
    """Return the oldest release of ONNX Runtime that runs ``model``, such as ``1.24``."""
    needed = [OPSETS[model.graph.opset_imports[""]]]
    for node in model.graph:
        needed += [RIGHT_WINDOWS] if has_window(node) else []
        needed += [OPERATORS[node.op_type]] if node.op_type in OPERATORS else []
        needed += [ATTRIBUTES[name] for name in node.attributes if name in ATTRIBUTES]
    return ".".join(map(str, max(needed)))


def has_window(node: ir.Node) -> bool:
    """Return whether ``node`` is fused attention with a local window."""
    return (
        node.op_type == "GroupQueryAttention" and node.attributes["local_window_size"].as_int() > 0
    )
