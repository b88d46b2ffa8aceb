"""Run the bundle with onnxruntime-genai, in its own generation loop."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime_genai as og


def main():
    """Read a job from stdin, write tokens to stdout."""
    job = json.load(sys.stdin)
    model = og.Model(job["bundle"])
    count = job["new_tokens"]

    def rows(ids):
        ids = np.array(ids, np.int32)
        length = ids.shape[1] + count
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(
            batch_size=len(ids), max_length=length, min_length=length, do_sample=False
        )
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids if len(ids) > 1 else ids[0])
        for _ in range(count):
            generator.generate_next_token()
        return [
            [int(t) for t in generator.get_sequence(row)[ids.shape[1] :]] for row in range(len(ids))
        ]

    tokens = {name: rows([ids]) for name, ids in job["single"].items()}
    tokens["right"] = rows(job["right"]["ids"])  # it takes lengths from the padding token
    print(json.dumps({"version": og.__version__, "tokens": tokens}))


main()
