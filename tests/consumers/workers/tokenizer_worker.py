"""Load the bundle's tokenizer with transformers, and encode texts."""

from __future__ import annotations

import json
import sys

import transformers


def main():
    """Read a job from stdin, write token ids to stdout."""
    job = json.load(sys.stdin)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["bundle"])
    ids = {"tokenizer": [tokenizer(text)["input_ids"] for text in job["texts"]]}
    print(json.dumps({"version": transformers.__version__, "tokens": ids}))


main()
