"""The graph pass for ``model_windowed.onnx``: sliding-window caches.

A variant's two graphs read the same weights and compute the same results. The
first has the operators and the cache that every consumer of such graphs knows. In the second,
GroupQueryAttention drops keys that no later query can see, so neither time nor memory grows with
the text. That needs an in-place cache that is never empty, which only this project's runtime
guarantees.
"""

from __future__ import annotations

import onnx_ir as ir

from gemma3_export.config import Gemma3Config

__all__ = ["UseSlidingWindowCache", "has_sliding_layers"]


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
