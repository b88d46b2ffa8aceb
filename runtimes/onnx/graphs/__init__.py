"""Small ONNX graphs that help decoding, and one that tests whether a device works.

They are stored as files because the runtime does not need the package ``onnx``, which writes them:
``python -m gemma3_export.runtimes.onnx.graphs``.

Shapes: B rows, C capacity, V vocabulary, k candidates, n bytes.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["COPY_GRAPH", "PREPARATION_GRAPH", "PRODUCT_GRAPH", "SELECTION_GRAPH"]

# state [B, 2] (token, length of the row including it) and columns [1, C] -> input_ids [B, 1] and
# attention_mask [B, C]: ones for the tokens of the row
PREPARATION_GRAPH = Path(__file__).with_name("preparation.onnx")
# source [n] -> target [n]: bytes copied on the device
COPY_GRAPH = Path(__file__).with_name("copy.onnx")
# logits [B, 1, V], count k [1] -> packed [B, 1, 2k + 1]: the k largest logits, largest first, their
# tokens (float32 holds integers up to 2**24), and the sum of all logits, which is a finite number
# only if all of them are
SELECTION_GRAPH = Path(__file__).with_name("selection.onnx")
# left and right [2, 2] -> product [2, 2]: the smallest test of whether a device computes
PRODUCT_GRAPH = Path(__file__).with_name("product.onnx")
