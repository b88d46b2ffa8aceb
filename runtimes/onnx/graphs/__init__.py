"""Small ONNX graphs that help decoding, and one that tests whether a device works.

They are stored as files because the runtime does not need the package ``onnx``, which writes them:
``python -m gemma3_export.runtimes.onnx.graphs``.

Shapes: B rows, C capacity, V vocabulary, k candidates, n bytes; in blocks, C blocks of W tokens.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "BLOCK_SELECTION_GRAPH",
    "COPY_GRAPH",
    "GREEDY_GRAPH",
    "PREPARATION_GRAPH",
    "PRODUCT_GRAPH",
    "SELECTION_GRAPH",
]

# state [B, 2] (token, length of the row including it) and columns [1, C] -> input_ids [B, 1] and
# attention_mask [B, C]: ones for the tokens of the row
PREPARATION_GRAPH = Path(__file__).with_name("preparation.onnx")
# source [n] -> target [n]: bytes copied on the device
COPY_GRAPH = Path(__file__).with_name("copy.onnx")
# logits [B, 1, V], count k [1] -> packed [B, 1, 2k + 1]: the k largest logits, largest first, their
# tokens (float32 holds integers up to 2**24), and the sum of all logits, which is a finite number
# only if all of them are
SELECTION_GRAPH = Path(__file__).with_name("selection.onnx")
# The same as selection for several rows, for which TopK over the whole vocabulary is slow: the k
# largest logits are in the k blocks with the largest maxima. columns [C, W]: the ids 0 to V - 1
BLOCK_SELECTION_GRAPH = Path(__file__).with_name("block_selection.onnx")
# logits [B, 1, V], state and columns as in preparation -> packed [B, 1, 3]: the largest logit, its
# token (the first of equals), and the sum of all logits; next_state, input_ids and attention_mask
# as preparation makes them if that token is the next input
GREEDY_GRAPH = Path(__file__).with_name("greedy.onnx")
# left and right [2, 2] -> product [2, 2]: the smallest test of whether a device computes
PRODUCT_GRAPH = Path(__file__).with_name("product.onnx")
