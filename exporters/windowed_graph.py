"""The sibling of a fused graph whose sliding layers keep no more than their window.

Both graphs read the same weights and compute the same. ``model.onnx`` has the cache that every
consumer knows; in ``model_windowed.onnx`` GroupQueryAttention lets go of keys that no query will
see again, so neither its time nor its memory grows with the text. It needs a cache that lies in
place and is never empty, which only our own runtime promises.
"""

from __future__ import annotations

import onnx_ir as ir

from gemma3_export.config import Gemma3Config
from gemma3_export.signature import Signature

__all__ = ["let_go_of_old_tokens"]


def let_go_of_old_tokens(graph: ir.Graph, config: Gemma3Config) -> bool:
    """Make ``graph`` the windowed one, in place; False when no layer has a window."""
    if not any(config.is_sliding(layer) for layer in range(config.num_hidden_layers)):
        return False
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        if node.attributes["local_window_size"].as_int() > 0:
            node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", 1)
    signature = Signature.of(config, is_windowed=True)
    names = {spec.name: spec.axes for spec in (*signature.past, *signature.present)}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in names:
            value.shape = ir.Shape(names[value.name])
    return True
