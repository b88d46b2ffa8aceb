"""Padded batches, fed to a backend below the protocol (which never pads).

Consumers other than our own runtime pad: on the left where positions come from the mask, on the
right where GroupQueryAttention takes lengths from the mask's sums.

Shapes: B rows, T padded length, V vocabulary, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gemma3_export.parity.observations import CacheRead, Observation, Seen, least_tokens
from gemma3_export.parity.sequences import TokenSequence
from gemma3_export.runtimes.onnx.values import as_float32, run_graph, zeros
from gemma3_export.runtimes.protocol import IntArray, Runtime
from gemma3_export.runtimes.torch.cache import as_numpy

__all__ = ["accepts_padding", "padded_batch"]

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


def accepts_padding(runtime: Runtime) -> bool:
    """Whether this module knows how to feed padding to ``runtime``.

    A windowed ONNX graph takes no empty past; its sibling, which others consume, does.
    """
    is_windowed = getattr(runtime, "is_windowed", False)
    return runtime.name in ("onnx", "torchscript", "reference") and not is_windowed


def padded_batch(
    runtime: Runtime, sequences: Sequence[TokenSequence], rows: Sequence[int]
) -> list[Seen]:
    """Prefill whole sequences of different length in one padded batch with an empty past."""
    pads_right = getattr(runtime, "target", None) == "ort"
    ids, mask = pad([sequences[row].ids for row in rows], runtime.config.pad_token_id, pads_right)
    logits, present = _forward(runtime, ids, mask)
    seen: list[Seen] = []
    for index, row in enumerate(rows):
        keep = np.flatnonzero(mask[index])
        layers = [
            (key[index][:, keep], value[index][:, keep])
            for key, value in zip(present[::2], present[1::2], strict=True)
        ]
        positions = np.arange(len(keep))
        seen.append(Observation(row, positions, logits[index][keep], step=0, first_new=0))
        least = least_tokens(runtime.config, len(keep))
        seen.append(CacheRead(row, len(keep), layers, least))
    return seen


def pad(rows: Sequence[IntArray], token_id: int, pads_right: bool) -> tuple[IntArray, IntArray]:
    """Ids and mask [B, T]."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), token_id, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        part = slice(0, len(row)) if pads_right else slice(longest - len(row), longest)
        ids[index, part], mask[index, part] = row, 1
    return ids, mask


def _forward(runtime: Any, ids: IntArray, mask: IntArray) -> tuple[FloatArray, list[FloatArray]]:
    """Logits [B, T, V], and keys and values [B, K, T, H] in turn."""
    if runtime.name == "onnx":
        signature = runtime.signature
        empty = (ids.shape[0], runtime.config.num_key_value_heads, 0, runtime.config.head_dim)
        feeds: dict[str, Any] = {
            signature.input_ids.name: ids,
            signature.attention_mask.name: mask,
        }
        for spec in signature.past:
            feeds[spec.name] = zeros(empty, spec.dtype)
        names = [spec.name for spec in signature.outputs]
        logits, *present = map(as_float32, run_graph(runtime.session, names, feeds))
        return logits, present
    tokens, ones = (torch.from_numpy(array).to(runtime.device) for array in (ids, mask))
    with torch.inference_mode():
        if runtime.name == "torchscript":
            shape = (ids.shape[0], runtime.config.num_key_value_heads, 0, runtime.config.head_dim)
            past = [
                torch.zeros(shape, dtype=runtime.dtype, device=runtime.device)
                for _ in range(2 * runtime.config.num_hidden_layers)
            ]
            logits, *tensors = runtime.module(tokens, ones, past, torch.tensor([0]))
        else:
            output = runtime.model(tokens, ones)
            logits, tensors = output.logits, [t for pair in output.past_key_values for t in pair]
    return as_numpy(logits), [as_numpy(tensor) for tensor in tensors]
