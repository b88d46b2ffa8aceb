"""Run the TorchScript archive with torch alone, in a loop of its own."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch


def generate(model, config, ids, mask, count):
    """Return ``count`` greedy tokens per row; ``mask`` [B, T] is 0 for padding on the left."""
    empty = (len(ids), config["num_key_value_heads"], 0, config["head_dim"])
    past = [torch.zeros(empty) for _ in range(2 * config["num_hidden_layers"])]
    step, found = ids, []
    for _ in range(count):
        logits, *past = model(step, mask, past, torch.tensor([1]))
        step = logits[:, -1].argmax(-1, keepdim=True)
        found.append(step)
        mask = torch.cat((mask, torch.ones_like(step)), 1)
    return torch.cat(found, 1).tolist()


def main():
    """Read a job from stdin, write tokens to stdout."""
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    folder = Path(job["bundle"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = torch.jit.load(str(folder / "torchscript" / "model.ts"))

    def rows(ids, mask):
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        return generate(model, config, ids, mask, job["new_tokens"])

    with torch.inference_mode():
        tokens = {name: rows([ids], [[1] * len(ids)]) for name, ids in job["single"].items()}
        tokens["left"] = rows(job["left"]["ids"], job["left"]["mask"])
    print(json.dumps({"version": torch.__version__.split("+")[0], "tokens": tokens}))


main()
