"""Run prompts in a bundle's graph for prompts, whose products suit many tokens.

See the exporter's :mod:`gemma3_export.exporters.onnx.prefill_graph`: such a graph extends the cache
and returns no logits. The last tokens of a step, whose logits are wanted, therefore run in the
graph for decoding, and so do short steps, and steps that want all logits.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np

from gemma3_export.bundle import Bundle, Graph, Signature
from gemma3_export.device import Device
from gemma3_export.errors import InputError
from gemma3_export.runtimes.onnx.caches import OnnxCache
from gemma3_export.runtimes.onnx.session import (
    EXACT_PRODUCTS,
    X86,
    check_interface,
    has_exact_products,
    open_session,
)
from gemma3_export.runtimes.protocol import IntArray, PrefillProducts

__all__ = ["PrefillSession", "prefill_path"]

FEWEST_TOKENS = 16  # fewer are as fast in the other graph, where they cost no second step


def prefill_path(
    bundle: Bundle, graph: Graph, device: Device, wanted: PrefillProducts, *, is_windowed: bool
) -> str | None:
    """Return which of a bundle's graphs for prompts to run, None if prompts run in its other graph.

    Args:
        bundle: the bundle, for the message.
        graph: one of its graphs.
        device: where it runs.
        wanted: ``auto`` uses them where they are known to be faster: on x86.
        is_windowed: the cache is that of ``graph.windowed_path``.

    Raises:
        InputError: they are wanted, but there are none.
    """
    found = graph.prefill
    path = None if found is None else found.windowed_path if is_windowed else found.path
    if wanted == "blocks":
        return None
    if path is None or device.kind != "cpu":
        if wanted == "integers":
            reason = (
                f"{bundle.path} has no graph for prompts; export it with --prefill-graph"
                if path is None
                else "graphs for prompts run on the CPU only; pass --device cpu"
            )
            raise InputError(f"prefill with integers was requested, but {reason}")
        return None
    return path if wanted == "integers" or platform.machine() in X86 else None


class PrefillSession:
    """A session of a graph for prompts.

    Args:
        path: the graph.
        signature: the interface of the graph whose cache it extends.
        device: the CPU.
        threads: intra-op threads; None lets ONNX Runtime choose.

    Raises:
        InputError: the graph cannot be read, or does not fit its config.
    """

    def __init__(
        self, path: Path, signature: Signature, device: Device, threads: int | None
    ) -> None:
        self.signature = signature
        entries = {} if has_exact_products() else {EXACT_PRODUCTS: "1"}
        self.session: Any = open_session(path, device, threads=threads, entries=entries)
        inputs = (signature.input_ids, signature.attention_mask, *signature.past)
        check_interface(self.session, (*inputs, *signature.present), path)

    def count(self, new_tokens: int, num_logits: int) -> int:
        """Return how many of a step's first tokens to run here; the others give its logits."""
        first = new_tokens - num_logits if num_logits else 0
        return first if first >= FEWEST_TOKENS else 0

    def run(self, input_ids: IntArray, cache: OnnxCache, rows: range) -> None:
        """Extend ``rows`` of the cache by ``input_ids`` [R, T]."""
        new = input_ids.shape[1]
        mask = cache.attention_mask(new, rows)
        binding = cache.binding(self.session, rows)
        binding.bind_cpu_input(self.signature.input_ids.name, np.ascontiguousarray(input_ids))
        binding.bind_cpu_input(self.signature.attention_mask.name, mask)
        self.session.run_with_iobinding(binding)
        cache.advance(binding, new, rows)
