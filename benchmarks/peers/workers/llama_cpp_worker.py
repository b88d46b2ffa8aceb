"""Run llama.cpp through the C API that llama-cpp-python binds.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np
from numpy.typing import NDArray

__all__ = ["LlamaCppCandidate", "convert", "load"]

FTYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "BF16": 32}  # llama_ftype
ERROR = 4  # ggml_log_level
CHUNK_TOKENS = 2048  # llama.cpp's own default for a logical batch
IntArray = NDArray[np.int64]


class LlamaCppCandidate:
    """A GGUF file, with llama.cpp's defaults for cache types, flash attention and batches."""

    def __init__(self, path: Path, weight_format: str, threads: int) -> None:
        c.llama_backend_init()
        self.log = c.llama_log_callback(print_errors)  # llama.cpp keeps the pointer
        c.llama_log_set(self.log, None)
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise OSError(f"llama.cpp cannot load {path}")
        self.weight_format, self.threads = weight_format, threads
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def describe(self) -> dict[str, object]:
        """See ``Candidate`` in ``serving.py``."""
        context = self.context(1, 16, 1)
        threads = c.llama_n_threads(context)
        c.llama_free(context)
        return {
            "runtime": "llama.cpp",
            "llama-cpp-python": c.__version__,
            "dtype": self.weight_format,
            "device": "cpu",
            "threads": threads,
            "bytes_per_token": c.llama_model_size(self.model),
            "features": c.llama_print_system_info().decode().strip(),
        }

    def context(self, rows: int, length: int, outputs: int) -> Any:
        """Return a context, with cache and buffers, for ``rows`` sequences of ``length`` tokens."""
        parameters = c.llama_context_default_params()
        parameters.n_ctx = rows * length
        parameters.n_batch = min(CHUNK_TOKENS, rows * length)
        parameters.n_seq_max = rows
        parameters.n_outputs_max = outputs
        parameters.n_threads = parameters.n_threads_batch = self.threads
        context = c.llama_init_from_model(self.model, parameters)
        if not context:
            raise MemoryError(f"llama.cpp cannot create a context of {rows} x {length} tokens")
        return context

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See ``Candidate`` in ``serving.py``."""
        rows, length = prompt.shape
        started = time.perf_counter()
        context = self.context(rows, length + new_tokens + 1, rows)
        batch = c.llama_batch_init(max(CHUNK_TOKENS, rows), 0, 1)
        # Rows follow one another, so a chunk contains the end of one row, or several whole rows.
        flat = [
            (int(token), position, row)
            for row in range(rows)
            for position, token in enumerate(prompt[row])
        ]
        chosen = np.zeros(rows, np.int64)
        for start in range(0, len(flat), CHUNK_TOKENS):
            chunk = flat[start : start + CHUNK_TOKENS]
            last = [position == length - 1 for _, position, _ in chunk]
            decode(context, fill(batch, chunk, last))
            for index, (_, _, row) in enumerate(chunk):
                if last[index]:
                    chosen[row] = self.row_logits(context, index).argmax()
        tokens = [chosen]
        first = time.perf_counter()
        for step in range(new_tokens):
            entries = [(int(tokens[-1][row]), length + step, row) for row in range(rows)]
            decode(context, fill(batch, entries, [True] * rows))
            best = [self.row_logits(context, row).argmax() for row in range(rows)]
            tokens.append(np.array(best, np.int64))
        ended = time.perf_counter()
        c.llama_batch_free(batch)
        c.llama_free(context)
        return first - started, ended - first, np.stack(tokens, axis=1)

    def logits(self, ids: IntArray) -> NDArray[np.float32]:
        """See ``Candidate`` in ``serving.py``."""
        length = len(ids)
        context = self.context(1, length, length)
        batch = c.llama_batch_init(length, 0, 1)
        entries = [(int(token), position, 0) for position, token in enumerate(ids)]
        decode(context, fill(batch, entries, [True] * length))
        found = np.stack([self.row_logits(context, index) for index in range(length)])
        c.llama_batch_free(batch)
        c.llama_free(context)
        return found

    def row_logits(self, context: Any, index: int) -> NDArray[np.float32]:
        """Return the logits [V] of a token in the batch, a view that the next decode overwrites."""
        pointer = c.llama_get_logits_ith(context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))


def print_errors(level: int, text: bytes, _: object) -> None:
    """Print errors only: llama.cpp also logs pages of details about every context."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def fill(batch: Any, entries: Sequence[tuple[int, int, int]], wanted: Sequence[bool]) -> Any:
    """Fill llama.cpp's batch with (token, position, sequence) entries."""
    batch.n_tokens = len(entries)
    for index, (token, position, row) in enumerate(entries):
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = row
        batch.logits[index] = wanted[index]
    return batch


def decode(context: Any, batch: Any) -> None:
    """Run a batch; the context receives the results."""
    if code := c.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode returned {code}")


def load(model: Path, weight_format: str, threads: int) -> LlamaCppCandidate:
    """Load what :func:`convert` wrote."""
    return LlamaCppCandidate(model / "model.gguf", weight_format, threads)


def convert(source: Path, target: Path, weight_format: str) -> None:
    """Convert a folder of float32 safetensors to GGUF, and quantize it with llama.cpp.

    The file has no vocabulary, because the benchmark feeds token ids.
    """
    full = target / "full.gguf"
    write_gguf(source, full)
    if weight_format == "F32":
        full.rename(target / "model.gguf")
        return
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = FTYPES[weight_format]
    parameters.nthread = 1
    paths = (str(path).encode() for path in (full, target / "model.gguf"))
    if c.llama_model_quantize(*paths, ctypes.byref(parameters)):
        raise RuntimeError(
            f"llama.cpp cannot quantize to {weight_format}; its output above says why"
        )
    full.unlink()


def write_gguf(source: Path, target: Path) -> None:
    """Write the float32 model with the metadata that llama.cpp's converter writes for Gemma 3."""
    from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
    from safetensors import safe_open

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, layers)
    writer = GGUFWriter(target, "gemma3", use_temp_file=False)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if scaling := config.get("rope_scaling"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                tensor = weights.get_tensor(name).astype(np.float32)
                # GGUF stores the scale of a norm; Hugging Face stores the scale minus one.
                stored = tensor + 1 if name.endswith("norm.weight") else tensor
                writer.add_tensor(names.get_name(name, (".weight",)), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
