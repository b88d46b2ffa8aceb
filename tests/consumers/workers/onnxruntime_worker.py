"""Run the graph with onnxruntime alone, in a loop of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def generate(session, config, ids, mask, count):
    """Return ``count`` greedy tokens per row; ``mask`` [B, T] is 0 for padding."""
    inputs = {value.name: value.type for value in session.get_inputs()}
    names = [name for name in inputs if name.startswith("past_key_values")]
    empty = (len(ids), config["num_key_value_heads"], 0, config["head_dim"])
    past = [np.zeros(empty, np.float32) for _ in names]
    step, found = ids, []
    last = np.where(mask[:, -1] == 1, ids.shape[1] - 1, mask.sum(1) - 1)  # right: the last token
    for _ in range(count):
        feeds = {"input_ids": step, "attention_mask": mask} | dict(zip(names, past, strict=True))
        logits, *past = session.run(None, feeds)
        index = last if not found else np.zeros(len(ids), np.int64)
        token = logits[np.arange(len(ids)), index].argmax(-1)
        found.append(token)
        step, mask = token[:, None], np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return np.stack(found, 1).tolist()


def main():
    """Read a job from stdin, write tokens to stdout."""
    job = json.load(sys.stdin)
    folder = Path(job["bundle"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(folder / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def rows(ids, mask):
        return generate(session, config, np.array(ids), np.array(mask), job["new_tokens"])

    tokens = {name: rows([ids], [[1] * len(ids)]) for name, ids in job["single"].items()}
    for side in ("left", "right"):
        tokens[side] = rows(job[side]["ids"], job[side]["mask"])
    print(json.dumps({"version": onnxruntime.__version__, "tokens": tokens}))


main()
