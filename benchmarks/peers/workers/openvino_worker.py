"""Run OpenVINO GenAI with a model from optimum-intel.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from numpy.typing import NDArray

__all__ = ["OpenVinoCandidate", "convert", "load"]

IntArray = NDArray[np.int64]


class OpenVinoCandidate:
    """The library's text pipeline, which manages the cache and selects the tokens."""

    def __init__(self, path: Path, weight_format: str, threads: int) -> None:
        self.path, self.weight_format = path, weight_format
        self.properties = {"INFERENCE_NUM_THREADS": threads, "ENABLE_HYPER_THREADING": True}
        # Without a tokenizer: prompts are token ids.
        self.pipeline = openvino_genai.LLMPipeline(
            path, openvino_genai.Tokenizer(path), "CPU", **self.properties
        )

    def describe(self) -> dict[str, object]:
        """See ``Candidate`` in ``serving.py``."""
        return {
            "runtime": "openvino",
            "openvino": openvino.__version__,
            "openvino-genai": openvino_genai.__version__,
            "dtype": self.weight_format,
            "device": "CPU",
            "threads": self.properties["INFERENCE_NUM_THREADS"],
            "bytes_per_token": bytes_per_token(self.path / "openvino_model.xml"),
        }

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See ``Candidate`` in ``serving.py``."""
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = 1 + new_tokens
        options.ignore_eos = True
        options.do_sample = False
        ids = openvino.Tensor(prompt)
        inputs = openvino_genai.TokenizedInputs(ids, openvino.Tensor(np.ones_like(prompt)))
        done = self.pipeline.generate(inputs, options)
        metrics = done.perf_metrics
        first_s = metrics.get_ttft().mean / 1000
        whole_s = metrics.get_generate_duration().mean / 1000
        return first_s, whole_s - first_s, np.array(done.tokens, np.int64)

    def logits(self, ids: IntArray) -> NDArray[np.float32]:
        """See ``Candidate`` in ``serving.py``, run by OpenVINO's core on the same file."""
        compiled = openvino.Core().compile_model(
            self.path / "openvino_model.xml", "CPU", self.properties
        )
        request = compiled.create_infer_request()
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        known = {name for port in compiled.inputs for name in port.get_names()}
        request.infer({name: value for name, value in feeds.items() if name in known})
        found: NDArray[np.float32] = request.get_tensor("logits").data[0].copy()
        return found


def bytes_per_token(path: Path) -> int:
    """Add up all constants except those that are only gathered from, such as an embedding."""
    total = 0
    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() != "Constant":
            continue
        if only_gathered(node):
            continue
        bits = node.get_element_type().bitwidth
        total += math.ceil(math.prod(node.get_output_shape(0)) * bits / 8)
    return total


def only_gathered(node: openvino.Node) -> bool:
    """Return whether every path from a constant leads to a Gather, ignoring decompression."""
    targets = [port.get_node() for output in node.outputs() for port in output.get_target_inputs()]
    if not targets:
        return False
    passed = ("Convert", "Subtract", "Multiply", "Reshape")
    return all(
        target.get_type_name() == "Gather"
        or (target.get_type_name() in passed and only_gathered(target))
        for target in targets
    )


def load(model: Path, weight_format: str, threads: int) -> OpenVinoCandidate:
    """Load what :func:`convert` wrote."""
    return OpenVinoCandidate(model, weight_format, threads)


def convert(source: Path, target: Path, weight_format: str) -> None:
    """Export and compress with optimum-intel, with its defaults for int8 and int4."""
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    bits = {"int8": 8, "int4": 4}.get(weight_format)
    quantization = None if bits is None else OVWeightQuantizationConfig(bits=bits)
    model = OVModelForCausalLM.from_pretrained(
        source,
        export=True,
        compile=False,
        load_in_8bit=False if bits is None else None,
        quantization_config=quantization,
    )
    model.save_pretrained(target)
    tokenizers = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    for name, converted in zip(("tokenizer", "detokenizer"), tokenizers, strict=True):
        openvino.save_model(converted, target / f"openvino_{name}.xml")
