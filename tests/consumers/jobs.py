"""What a consumer is asked, and what it must answer: the greedy tokens of our own runtime.

prompt      one short prompt
past window one prompt longer than the sliding window, which decoding leaves further behind
left        three prompts of different lengths in one batch, padded on the left
right       the same, padded on the right
tokenizer   the token ids of texts
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np

from gemma3_export.api.model_files import bundle_tokenizer
from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import Bundle
from gemma3_export.parity.cases import pad
from gemma3_export.runtimes.generation.generate import generate
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import PaddingSide

__all__ = ["CASES", "Job", "job_for"]

CASES = ("prompt", "past window", "left", "right", "tokenizer")
NEW_TOKENS = 12
MAX_ID = 200_000  # the last ids of Gemma's vocabulary are not words
PADDING_SIDES: tuple[PaddingSide, ...] = get_args(PaddingSide)
LENGTHS = (9, 4, 7)  # of the prompts in a batch
TEXTS = (
    "The sea is",
    "Am Morgen lag Nebel über dem Fluß.",
    "def f(x):\n    return x * 2",
    "雨の日",
)
Rows = list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The input of a worker, as JSON."""

    bundle: str  # absolute path
    new_tokens: int
    single: dict[str, list[int]]  # prompts to run alone
    left: dict[str, Rows]  # ids and mask of a batch
    right: dict[str, Rows]
    texts: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the job as a worker reads it."""
        return asdict(self)


def job_for(bundle: Bundle) -> tuple[Job, dict[str, Rows]]:
    """Return the job for a bundle, and the answer to every case.

    Random prompts are drawn until no answer contains a token that ends a text, because consumers
    differ in what they do after it.
    """
    runtime = open_runtime(bundle, "onnx", device="cpu")
    config = bundle.config
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, stop_token_ids=())
    generator = np.random.Generator(np.random.Philox(key=[7, 0]))
    special = {config.pad_token_id, config.bos_token_id, *config.eos_token_id}

    def drawn(length: int) -> tuple[list[int], list[int]]:
        while True:
            ids = generator.integers(max(special) + 1, min(config.vocab_size, MAX_ID), length - 1)
            prompt = [config.bos_token_id, *ids.tolist()]
            (completion,) = generate(runtime, [prompt], SamplingParams(), options).collect()
            if special.isdisjoint(completion.token_ids):
                return prompt, list(completion.token_ids)

    batch, answers = zip(*(drawn(length) for length in LENGTHS), strict=True)
    long, long_answer = drawn(config.sliding_window + 5)
    sides: dict[PaddingSide, dict[str, Rows]] = {}
    for side in PADDING_SIDES:
        ids, mask = pad([np.array(row) for row in batch], config.pad_token_id, side)
        sides[side] = {"ids": ids.tolist(), "mask": mask.tolist()}
    job = Job(
        bundle=str(bundle.path.resolve()),
        new_tokens=NEW_TOKENS,
        single={"prompt": batch[0], "past window": long},
        left=sides["left"],
        right=sides["right"],
        texts=TEXTS,
    )
    tokenizer = bundle_tokenizer(bundle)
    assert tokenizer is not None
    return job, {
        "prompt": [answers[0]],
        "past window": [long_answer],
        "left": list(answers),
        "right": list(answers),
        "tokenizer": [list(tokenizer.encode(text)) for text in TEXTS],
    }
