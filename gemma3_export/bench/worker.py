"""Our own candidates of a benchmark, and transformers with a bundle's weights.

Started by :mod:`gemma3_export.bench.process`, in a process of its own; the protocol is that of
:mod:`gemma3_export.bench.serving`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gemma3_export.api.opening import open_runtime
from gemma3_export.bench.serving import Candidate, Load, serve
from gemma3_export.bundle import Bundle
from gemma3_export.dtypes import ELEMENT_TYPES, EXPORT_DTYPES
from gemma3_export.runtimes.generation.candidates import Candidates, ChoosesCandidates
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.onnx.session import CudaOptions
from gemma3_export.runtimes.protocol import IntArray, KVCache, Logits, Runtime

__all__ = ["PEER", "TRUTH", "open_candidate"]

PEER = "transformers"
TRANSFORMERS = (PEER, f"{PEER}:static")
TRUTH = "truth"  # the reference in float32, with weights that need not be the bundle's
PREFILL_CHUNK = 512  # as `generate` feeds long prompts


class RuntimeCandidate:
    """Any of a bundle's runtimes."""

    def __init__(self, runtime: Runtime, bytes_per_token: int) -> None:
        self.runtime = runtime
        self.bytes_per_token = bytes_per_token

    def describe(self) -> dict[str, object]:
        """See :class:`Candidate`."""
        return self.runtime.describe() | {"bytes_per_token": self.bytes_per_token}

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See :class:`Candidate`."""
        runtime, length = self.runtime, prompt.shape[1]
        started = time.perf_counter()
        cache = runtime.new_cache(prompt.shape[0], length + new_tokens)
        for start in range(0, length, PREFILL_CHUNK):
            chunk = np.ascontiguousarray(prompt[:, start : start + PREFILL_CHUNK])
            logits = runtime.step(chunk, cache, num_logits=1)
        tokens = [logits[:, -1:].argmax(-1)]
        first = time.perf_counter()
        for _ in range(new_tokens):
            tokens.append(self.next_tokens(tokens[-1], cache))
        return first - started, time.perf_counter() - first, np.concatenate(tokens, axis=1)

    def next_tokens(self, tokens: IntArray, cache: KVCache) -> IntArray:
        """[B, 1] the likeliest tokens after ``tokens`` [B, 1], as `generate` gets them."""
        if isinstance(self.runtime, ChoosesCandidates):
            greedy = [SamplingParams()] * len(tokens)
            chosen = self.runtime.step_candidates(tokens, cache, greedy)
            if chosen is not None:
                return np.array([[likeliest(row)] for row in chosen], np.int64)
        likely: IntArray = self.runtime.step(tokens, cache, num_logits=1)[:, -1:].argmax(-1)
        return likely

    def logits(self, ids: IntArray) -> Logits:
        """See :class:`Candidate`."""
        cache = self.runtime.new_cache(1, len(ids))
        logits: Logits = self.runtime.step(ids[None], cache, num_logits=len(ids))[0]
        return logits


def likeliest(row: Logits | Candidates) -> int:
    """The token of the largest logit; of equals the first one."""
    if isinstance(row, Candidates):
        return int(row.ids[row.scores.argmax()])
    return int(row.argmax())


def open_candidate(
    name: str, bundle_path: Path, device: str, threads: int, cuda: CudaOptions | None = None
) -> Candidate:
    """Load one candidate.

    Args:
        name: one of :data:`TRANSFORMERS`, or of :data:`gemma3_export.bundle.RUNTIMES`.
        bundle_path: where the weights are.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator.
        cuda: what the ONNX runtime may do on a GPU.
    """
    bundle = Bundle(bundle_path)
    if name in TRANSFORMERS:
        from gemma3_export.bench.transformers_candidate import open_transformers

        return open_transformers(bundle, device, threads, is_static=name != PEER)
    runtime = open_runtime(bundle, name, device=device, threads=threads, cuda=cuda)
    size = weight_bytes(bundle, name)
    if isinstance(runtime, OnnxRuntime) and runtime.is_screened:
        size -= 4 * bundle.config.vocab_size * bundle.config.hidden_size
        size += bundle.file_bytes(f"{bundle.graph(name).windowed_path}_data")
    return RuntimeCandidate(runtime, size)


def weight_bytes(bundle: Bundle, name: str) -> int:
    """What a token reads: all weights; of a tied embedding the head reads every row."""
    if name == "onnx":
        path = bundle.graph(name).path  # small tensors are in it, the rest in a file beside it
        return bundle.file_bytes(path) + bundle.file_bytes(f"{path}_data")
    if name == "reference":
        return 4 * bundle.config.num_parameters
    graph = bundle.graph(name)
    exported = EXPORT_DTYPES[graph.dtype]
    if exported.element is None:  # the archive holds little beside its blocks
        return bundle.file_bytes(graph.path)
    return ELEMENT_TYPES[exported.element].size_bytes * bundle.config.num_parameters


def open_truth(weights: str, threads: int) -> Candidate:
    """The reference in float32.

    Args:
        weights: as :func:`gemma3_export.api.exporting.open_weights` takes it.
        threads: threads inside one operator.
    """
    import torch

    from gemma3_export.api.exporting import open_weights
    from gemma3_export.reference.loading import load_reference
    from gemma3_export.reference.runtime import ReferenceRuntime

    torch.set_num_threads(threads)
    with open_weights(weights) as source:
        size = 4 * source.config.num_parameters
        return RuntimeCandidate(ReferenceRuntime(load_reference(source)), size)


def import_framework(name: str) -> None:
    """Import what ``name`` runs on, so that loading is timed without it."""
    if name == "onnx":
        import onnxruntime  # noqa: F401
    else:
        import torch  # noqa: F401

    if name in TRANSFORMERS:
        from transformers import Gemma3ForCausalLM  # noqa: F401


def opener(asked: dict[str, Any]) -> Load:
    """See :func:`gemma3_export.bench.serving.serve`."""
    name, threads = asked["name"], asked["threads"]
    import_framework(name)
    if name == TRUTH:
        return lambda: open_truth(asked["weights"], threads)
    cuda = CudaOptions(**asked["cuda"]) if "cuda" in asked else None
    return lambda: open_candidate(name, Path(asked["bundle"]), asked["device"], threads, cuda)


if __name__ == "__main__":
    serve(opener)
