"""Run onnxruntime-genai with a model from its own builder.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

__all__ = ["GenaiCandidate", "convert", "load"]

READ_BYTES = "read_bytes.json"  # bytes of weights that one decode step reads
IntArray = NDArray[np.int64]


class GenaiCandidate:
    """The library's own generator with greedy search and its own cache."""

    def __init__(self, path: Path, weight_format: str) -> None:
        self.model = og.Model(str(path))
        self.weight_format = weight_format
        options = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        session = options["model"]["decoder"]["session_options"]
        self.threads = session["intra_op_num_threads"]
        self.bytes_per_token = json.loads((path / READ_BYTES).read_text(encoding="utf-8"))

    def describe(self) -> dict[str, object]:
        """See ``Candidate`` in ``serving.py``."""
        return {
            "runtime": "onnxruntime-genai",
            "onnxruntime-genai": og.__version__,
            "dtype": self.weight_format,
            "device": self.model.device_type,
            "threads": self.threads,
            "bytes_per_token": self.bytes_per_token,
        }

    def generator(self, rows: int, length: int) -> og.Generator:
        """Return a greedy generator for ``rows`` sequences of ``length`` tokens."""
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(
            batch_size=rows, max_length=length, min_length=length, do_sample=False
        )
        return og.Generator(self.model, parameters)

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See ``Candidate`` in ``serving.py``."""
        rows, length = prompt.shape
        started = time.perf_counter()
        generator = self.generator(rows, length + new_tokens + 2)
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        ended = time.perf_counter()
        tokens = np.stack([generator.get_sequence(row)[length:] for row in range(rows)])
        return first - started, ended - first, tokens.astype(np.int64)

    def logits(self, ids: IntArray) -> NDArray[np.float32]:
        """See ``Candidate`` in ``serving.py``."""
        generator = self.generator(1, len(ids) + 2)
        generator.append_tokens(ids[None].astype(np.int32))
        found: NDArray[np.float32] = np.asarray(generator.get_output("logits"), np.float32)[0]
        return found


def load(model: Path, weight_format: str, threads: int) -> GenaiCandidate:
    """Load what :func:`convert` wrote, after writing ``threads`` to its configuration."""
    file = model / "genai_config.json"
    options = json.loads(file.read_text(encoding="utf-8"))
    session = options["model"]["decoder"]["session_options"]
    if session.get("intra_op_num_threads") != threads:
        session["intra_op_num_threads"] = threads
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(options, indent=1), encoding="utf-8")
        partial.replace(file)
    return GenaiCandidate(model, weight_format)


def convert(source: Path, target: Path, weight_format: str) -> None:
    """Build a CPU model with the library's builder; int4 uses 8-bit activations, the fastest."""
    build(source, target, weight_format, "cpu")


def build(source: Path, target: Path, weight_format: str, provider: str) -> None:
    """Build the model, and record the bytes of weights that one decode step reads."""
    from onnx_bytes import bytes_per_token
    from onnxruntime_genai.models.builder import create_model

    extra = {"int4_accuracy_level": 4} if (weight_format, provider) == ("int4", "cpu") else {}
    cache = target / "cache"
    create_model(None, str(source), str(target), weight_format, provider, str(cache), **extra)
    if cache.exists():
        cache.rmdir()
    count = bytes_per_token(target / "model.onnx")
    (target / READ_BYTES).write_text(json.dumps(count), encoding="utf-8")
