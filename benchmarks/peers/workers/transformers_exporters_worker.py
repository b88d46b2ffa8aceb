"""Run the ONNX export of transformers.exporters with its own runner, in ONNX Runtime.

``int8`` uses its quantizer with ONNX Runtime's settings: 8-bit weights with one scale per matrix,
and activations that are quantized at run time. The output head stays in float32.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from numpy.typing import NDArray
from transformers import DynamicCache, Gemma3ForCausalLM
from transformers.exporters import (
    ExportedModel,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)

__all__ = ["ExportedCandidate", "convert", "load"]

READ_BYTES = "read_bytes.json"  # bytes of weights that one decode step reads
TRACED_SHAPE = (2, 8)  # B and T of the example; a batch of 1 would be fixed in the graph
IntArray = NDArray[np.int64]


class ExportedCandidate:
    """The exported graphs for prompts and for single tokens, with the cache that they return."""

    def __init__(self, path: Path, weight_format: str, threads: int) -> None:
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ExportedModel.from_pretrained(path, device="cpu", session_options=options)
        self.weight_format = weight_format
        self.bytes_per_token = json.loads((path / READ_BYTES).read_text(encoding="utf-8"))

    def describe(self) -> dict[str, object]:
        """See ``Candidate`` in ``serving.py``."""
        session = self.model.runners["decode"].session
        return {
            "runtime": "transformers.exporters",
            "transformers": transformers.__version__,
            "onnxruntime": onnxruntime.__version__,
            "dtype": self.weight_format,
            "device": "cpu",
            "threads": session.get_session_options().intra_op_num_threads,
            "bytes_per_token": self.bytes_per_token,
        }

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See ``Candidate`` in ``serving.py``."""
        with torch.inference_mode():
            started = time.perf_counter()
            logits, cache = self.step("prefill", torch.from_numpy(prompt), None, 0)
            tokens = [logits[:, -1:].argmax(-1)]
            first = time.perf_counter()
            for length in range(prompt.shape[1], prompt.shape[1] + new_tokens):
                logits, cache = self.step("decode", tokens[-1], cache, length)
                tokens.append(logits[:, -1:].argmax(-1))
            ended = time.perf_counter()
        return first - started, ended - first, torch.cat(tokens, dim=1).numpy()

    def logits(self, ids: IntArray) -> NDArray[np.float32]:
        """See ``Candidate`` in ``serving.py``."""
        with torch.inference_mode():
            logits, _ = self.step("prefill", torch.from_numpy(ids)[None], None, 0)
        found: NDArray[np.float32] = logits[0].float().numpy()
        return found

    def step(
        self, stage: str, ids: torch.Tensor, cache: DynamicCache | None, length: int
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Run one graph on ``ids`` [B, T] after ``length`` tokens; return logits and the cache."""
        positions = torch.arange(length, length + ids.shape[1]).expand(ids.shape)
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        output = self.model.runners[stage](input_ids=ids, position_ids=positions, cache=cache)
        return output.logits, output.cache


def load(model: Path, weight_format: str, threads: int) -> ExportedCandidate:
    """Load what :func:`convert` wrote."""
    return ExportedCandidate(model, weight_format, threads)


def convert(source: Path, target: Path, weight_format: str) -> None:
    """Export with the library, fused for CPUs; ``weight_format`` is fp32 or int8."""
    from onnx_bytes import bytes_per_token

    quantizer = (
        OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig()) if weight_format == "int8" else None
    )
    model = Gemma3ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.ones(TRACED_SHAPE, dtype=torch.int64)
    exported = OnnxExporter().export_for_generation(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer),
    )
    exported.save_pretrained(target)
    count = bytes_per_token(target / "decode.onnx")
    (target / READ_BYTES).write_text(json.dumps(count), encoding="utf-8")
