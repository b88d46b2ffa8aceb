"""One candidate of a benchmark, in a process of its own.

Started by :mod:`gemma3_export.benchmark` and driven over pipes, one JSON object a line: first what
to load, then one line for each measurement. The answers go to what was stdout; whatever libraries
print goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemma3_export.backends import open_runtime
from gemma3_export.bundle import Bundle
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = ["PEER", "Candidate", "open_candidate", "serve"]

PEER = "transformers"
PREFILL_CHUNK = 512  # as `generate` feeds long prompts


class Candidate(Protocol):
    """A loaded model that can be timed."""

    def describe(self) -> dict[str, object]:
        """Versions, device and threads really used."""

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """Continue ``prompt`` [B, T] greedily.

        Returns:
            Seconds to the first token, seconds for ``new_tokens`` more, and all of these
            [B, 1 + new_tokens].
        """


class RuntimeCandidate:
    """Any of a bundle's runtimes."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def describe(self) -> dict[str, object]:
        """See :class:`Candidate`."""
        return self.runtime.describe()

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
            logits = runtime.step(tokens[-1], cache, num_logits=1)
            tokens.append(logits[:, -1:].argmax(-1))
        return first - started, time.perf_counter() - first, np.concatenate(tokens, axis=1)


class TransformersCandidate:
    """Hugging Face's model in float32, with its default cache and attention."""

    def __init__(self, bundle: Bundle, device: str, threads: int) -> None:
        import torch
        import transformers

        from gemma3_export.exporters.bundle_weights import open_bundle_weights
        from gemma3_export.runtimes.torchscript_runtime import torch_device
        from gemma3_export.transformers_model import build_transformers_model

        torch.set_num_threads(threads)
        self.device = str(torch_device(device))
        self.version = transformers.__version__
        with open_bundle_weights(bundle) as weights:
            self.model = build_transformers_model(bundle.config, weights.read, device=self.device)

    def describe(self) -> dict[str, object]:
        """See :class:`Candidate`."""
        import torch

        return {
            "runtime": PEER,
            "transformers": self.version,
            "torch": torch.__version__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
        }

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See :class:`Candidate`."""
        import torch

        with torch.inference_mode():
            started = time.perf_counter()
            ids = torch.from_numpy(prompt).to(self.device)
            output = self.model(ids, use_cache=True, logits_to_keep=1)
            tokens = [output.logits[:, -1:].argmax(-1).cpu()]
            first = time.perf_counter()
            for _ in range(new_tokens):
                output = self.model(
                    tokens[-1].to(self.device),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                    logits_to_keep=1,
                )
                tokens.append(output.logits[:, -1:].argmax(-1).cpu())
            ended = time.perf_counter()
        return first - started, ended - first, torch.cat(tokens, dim=1).numpy()


def open_candidate(name: str, bundle_path: Path, device: str, threads: int) -> Candidate:
    """Load one candidate.

    Args:
        name: ``transformers``, or one of :data:`gemma3_export.bundle.RUNTIMES`.
        bundle_path: where the weights are.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator.
    """
    bundle = Bundle(bundle_path)
    if name == PEER:
        return TransformersCandidate(bundle, device, threads)
    return RuntimeCandidate(open_runtime(bundle, name, device=device, threads=threads))


def import_framework(name: str) -> None:
    """Import what ``name`` runs on, so that loading is timed without it."""
    if name == "onnx":
        import onnxruntime  # noqa: F401
    else:
        import torch  # noqa: F401

    if name == PEER:
        from transformers import Gemma3ForCausalLM  # noqa: F401


def peak_memory_bytes() -> int:
    """The most memory that this process has held, code and mapped weights included."""
    status = Path("/proc/self/status")  # rusage would count the process that forked us
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """One measurement, as JSON."""
    prompt = np.array(request["prompt"], dtype=np.int64)
    first_s, decode_s, tokens = candidate.run(prompt, request["new_tokens"])
    return {
        "time_to_first_token_s": first_s,
        "decode_s": decode_s,
        "tokens": tokens.tolist(),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def serve() -> None:
    """Answer the parent until its pipe closes."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            asked = json.loads(sys.stdin.readline())
            started = time.perf_counter()
            import_framework(asked["name"])
            imported = time.perf_counter()
            candidate = open_candidate(
                asked["name"], Path(asked["bundle"]), asked["device"], asked["threads"]
            )
            loaded = time.perf_counter()
            answer(
                {
                    "import_s": imported - started,
                    "load_s": loaded - imported,
                    "describe": candidate.describe(),
                }
            )
            for line in sys.stdin:
                answer(measure(candidate, json.loads(line)))
        except Gemma3ExportError as error:
            answer({"error": type(error).__name__, "message": str(error)})


if __name__ == "__main__":
    serve()
