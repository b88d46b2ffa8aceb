"""Run optimum-onnx with a model from its own exporter.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from optimum.onnxruntime import ORTModelForCausalLM

__all__ = ["OptimumCandidate", "convert", "load"]

READ_BYTES = "read_bytes.json"  # bytes of weights that one decode step reads
IntArray = NDArray[np.int64]


class OptimumCandidate:
    """The library's model and its cache, fed token by token."""

    def __init__(self, path: Path, weight_format: str, threads: int) -> None:
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(
            path, provider="CPUExecutionProvider", session_options=options
        )
        self.weight_format = weight_format
        self.bytes_per_token = json.loads((path / READ_BYTES).read_text(encoding="utf-8"))

    def describe(self) -> dict[str, object]:
        """See ``Candidate`` in ``serving.py``."""
        return {
            "runtime": "optimum-onnx",
            "optimum-onnx": version("optimum-onnx"),
            "onnxruntime": onnxruntime.__version__,
            "dtype": self.weight_format,
            "device": "cpu",
            "threads": self.model.model.get_session_options().intra_op_num_threads,
            "bytes_per_token": self.bytes_per_token,
        }

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See ``Candidate`` in ``serving.py``."""
        with torch.inference_mode():
            started = time.perf_counter()
            ids = torch.from_numpy(prompt)
            mask = torch.ones(prompt.shape[0], prompt.shape[1] + new_tokens, dtype=torch.int64)
            output = self.model(ids, attention_mask=mask[:, : ids.shape[1]], use_cache=True)
            tokens = [output.logits[:, -1:].argmax(-1)]
            first = time.perf_counter()
            for step in range(1, new_tokens + 1):
                output = self.model(
                    tokens[-1],
                    attention_mask=mask[:, : ids.shape[1] + step],
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
                tokens.append(output.logits[:, -1:].argmax(-1))
            ended = time.perf_counter()
        return first - started, ended - first, torch.cat(tokens, dim=1).numpy()

    def logits(self, ids: IntArray) -> NDArray[np.float32]:
        """See ``Candidate`` in ``serving.py``."""
        with torch.inference_mode():
            batch = torch.from_numpy(ids)[None]
            output = self.model(batch, attention_mask=torch.ones_like(batch), use_cache=True)
        found: NDArray[np.float32] = output.logits[0].float().numpy()
        return found


def load(model: Path, weight_format: str, threads: int) -> OptimumCandidate:
    """Load what :func:`convert` wrote."""
    return OptimumCandidate(model, weight_format, threads)


def convert(source: Path, target: Path, weight_format: str) -> None:
    """Export with the library; ``weight_format`` is always fp32."""
    from onnx_bytes import bytes_per_token

    ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(target)
    count = bytes_per_token(target / "model.onnx")
    (target / READ_BYTES).write_text(json.dumps(count), encoding="utf-8")
