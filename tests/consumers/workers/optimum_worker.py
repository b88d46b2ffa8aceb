"""Run the bundle with optimum-onnx, in transformers' own generation loop."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main():
    """Read a job from stdin, write tokens to stdout."""
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    model = ORTModelForCausalLM.from_pretrained(
        job["bundle"], subfolder="onnx", file_name="model.onnx"
    )

    def rows(ids, mask):
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        found = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=job["new_tokens"],
            min_new_tokens=job["new_tokens"],
        )
        return found[:, ids.shape[1] :].tolist()

    tokens = {name: rows([ids], [[1] * len(ids)]) for name, ids in job["single"].items()}
    tokens["left"] = rows(job["left"]["ids"], job["left"]["mask"])
    print(json.dumps({"version": version("optimum-onnx"), "tokens": tokens}))


main()
