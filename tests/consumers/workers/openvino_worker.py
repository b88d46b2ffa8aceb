"""Run the graph with OpenVINO, in a loop of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import openvino


def generate(model, config, ids, mask, count):
    """Return ``count`` greedy tokens per row; ``mask`` [B, T] is 0 for padding on the left."""
    names = [port.any_name for port in model.inputs if "past_key_values" in port.any_name]
    empty = (len(ids), config["num_key_value_heads"], 0, config["head_dim"])
    past = [np.zeros(empty, np.float32) for _ in names]
    step, found = ids, []
    for _ in range(count):
        feeds = {"input_ids": step, "attention_mask": mask} | dict(zip(names, past, strict=True))
        if any(port.any_name == "num_logits_to_keep" for port in model.inputs):
            feeds["num_logits_to_keep"] = np.array([1])
        logits, *past = model(feeds).to_tuple()
        token = logits[:, -1].argmax(-1)
        found.append(token)
        step, mask = token[:, None], np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return np.stack(found, 1).tolist()


def main():
    """Read a job from stdin, write tokens to stdout."""
    job = json.load(sys.stdin)
    folder = Path(job["bundle"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.compile_model(core.read_model(folder / "onnx" / "model.onnx"), "CPU", hints)

    def rows(ids, mask):
        return generate(model, config, np.array(ids), np.array(mask), job["new_tokens"])

    tokens = {name: rows([ids], [[1] * len(ids)]) for name, ids in job["single"].items()}
    tokens["left"] = rows(job["left"]["ids"], job["left"]["mask"])
    print(json.dumps({"version": openvino.__version__.split("-")[0], "tokens": tokens}))


main()
