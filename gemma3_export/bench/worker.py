"""The worker for candidates of this environment: runtimes, the reference model and transformers.

:mod:`gemma3_export.bench.process` starts it, and :mod:`gemma3_export.bench.serving` has the
protocol.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gemma3_export.api.opening import open_runtime
from gemma3_export.bench.serving import Candidate, Load, serve
from gemma3_export.bundle import Bundle
from gemma3_export.device import CudaOptions
from gemma3_export.dtypes import ELEMENT_TYPES, EXPORT_DTYPES
from gemma3_export.limits import PREFILL_CHUNK
from gemma3_export.runtimes.generation.candidates import Candidates, SelectsCandidates
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.onnx.huge_pages import huge_page_bytes
from gemma3_export.runtimes.onnx.session import import_onnxruntime
from gemma3_export.runtimes.protocol import (
    NO_LOGITS,
    IntArray,
    KVCache,
    Logits,
    Runtime,
    RuntimeInfo,
)

__all__ = ["FULL_PRECISION", "open_candidate"]

TRANSFORMERS = ("transformers", "transformers:static")
FULL_PRECISION = "full precision"  # the float32 reference model with weights of its own


class RuntimeCandidate:
    """A runtime, decoding greedily as `generate` does."""

    def __init__(self, runtime: Runtime, bytes_per_token: int) -> None:
        self.runtime = runtime
        self.bytes_per_token = bytes_per_token

    def describe(self) -> dict[str, object]:
        """See :class:`Candidate`."""
        return self.runtime.info.to_json() | {
            "huge_page_bytes": huge_page_bytes(),
            "bytes_per_token": self.bytes_per_token,
        }

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See :class:`Candidate`."""
        runtime, length = self.runtime, prompt.shape[1]
        started = time.perf_counter()
        cache = runtime.new_cache(prompt.shape[0], length + new_tokens)
        for start in range(0, length, PREFILL_CHUNK):
            chunk = np.ascontiguousarray(prompt[:, start : start + PREFILL_CHUNK])
            is_last = start + PREFILL_CHUNK >= length
            logits = runtime.step(chunk, cache, num_logits=1 if is_last else NO_LOGITS)
        tokens = [logits[:, -1:].argmax(-1)]
        first = time.perf_counter()
        for _ in range(new_tokens):
            tokens.append(self.next_tokens(tokens[-1], cache))
        return first - started, time.perf_counter() - first, np.concatenate(tokens, axis=1)

    def next_tokens(self, tokens: IntArray, cache: KVCache) -> IntArray:
        """Return the most likely tokens [B, 1] after ``tokens`` [B, 1]."""
        if isinstance(self.runtime, SelectsCandidates):
            greedy = [SamplingParams()] * len(tokens)
            chosen = self.runtime.step_candidates(tokens, cache, greedy)
            if chosen is not None:
                return np.array([[most_likely(row)] for row in chosen], np.int64)
        likely: IntArray = self.runtime.step(tokens, cache, num_logits=1)[:, -1:].argmax(-1)
        return likely

    def logits(self, ids: IntArray) -> Logits:
        """See :class:`Candidate`."""
        cache = self.runtime.new_cache(1, len(ids))
        logits: Logits = self.runtime.step(ids[None], cache, num_logits=len(ids))[0]
        return logits


def most_likely(row: Logits | Candidates) -> int:
    """Return the token with the largest logit, or the first of several."""
    if isinstance(row, Candidates):
        return int(row.ids[row.scores.argmax()])
    return int(row.argmax())


def open_candidate(
    name: str,
    bundle: Bundle,
    device: str,
    threads: int,
    cuda: CudaOptions | None = None,
    *,
    huge_pages: bool = False,
) -> Candidate:
    """Load one candidate.

    Args:
        name: one of :data:`TRANSFORMERS` or :data:`gemma3_export.bundle.RUNTIMES`.
        bundle: the bundle that has the weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads.
        cuda: options of the ONNX runtime on a GPU.
        huge_pages: move the weights of the ONNX runtime into huge pages.
    """
    if name in TRANSFORMERS:
        from gemma3_export.bench.transformers_candidate import (
            StaticCandidate,
            TransformersCandidate,
        )

        kind = StaticCandidate if name.endswith(":static") else TransformersCandidate
        return kind(bundle, device, threads)
    runtime = open_runtime(
        bundle, name, device=device, threads=threads, cuda=cuda, huge_pages=huge_pages
    )
    return RuntimeCandidate(runtime, weight_bytes(bundle, runtime.info))


def weight_bytes(bundle: Bundle, info: RuntimeInfo) -> int:
    """Return the bytes of weights that one decode step reads.

    These are all weights, since a tied head reads the whole embedding. A screened head reads its
    small copy of the embedding instead.
    """
    if info.name == "reference":
        return 4 * bundle.config.num_parameters
    graph = bundle.graph(info.name)
    if info.name == "onnx":  # small tensors are in the graph, the others in external data
        size = bundle.file_bytes(graph.path) + bundle.file_bytes(f"{graph.path}_data")
        if info.has_screened_head:
            size -= 4 * bundle.config.vocab_size * bundle.config.hidden_size
            size += bundle.file_bytes(f"{graph.windowed_path}_data")
        return size
    exported = EXPORT_DTYPES[graph.dtype]
    if exported.element is None:  # quantized: the archive contains little besides the weights
        return bundle.file_bytes(graph.path)
    return ELEMENT_TYPES[exported.element].size_bytes * bundle.config.num_parameters


def open_full_precision(weights: str, threads: int) -> Candidate:
    """Load the float32 reference model.

    Args:
        weights: what :func:`gemma3_export.api.exporting.open_weights` takes.
        threads: intra-op threads.
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
    """Import the framework of a candidate, so that loading is timed without the import."""
    if name == "onnx":
        import_onnxruntime()
    else:
        import torch  # noqa: F401

    if name in TRANSFORMERS:
        from transformers import Gemma3ForCausalLM  # noqa: F401


def opener(request: dict[str, Any]) -> Load:
    """Return what loads the requested candidate; see :func:`gemma3_export.bench.serving.serve`."""
    name, threads = request["name"], request["threads"]
    import_framework(name)
    if name == FULL_PRECISION:
        return lambda: open_full_precision(request["weights"], threads)
    cuda = CudaOptions(**request["cuda"]) if "cuda" in request else None
    return lambda: open_candidate(
        name,
        Bundle(request["bundle"], request.get("variant")),
        request["device"],
        threads,
        cuda,
        huge_pages=request.get("huge_pages", False),
    )


if __name__ == "__main__":
    serve(opener)
