"""Text from a model in training, by the same loop that serves the exported one."""

from __future__ import annotations

from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.runtimes.generation.loop import generate
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.tokenizer.tokenizer import StreamingDecoder, Tokenizer

__all__ = ["sample_text"]

TEMPERATURE, TOP_K = 0.8, 64


def sample_text(
    model: Gemma3, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """Continue ``prompt``, which may be empty; the sampler's draws touch no global state."""
    ids = tokenizer.encode(prompt)
    if not ids:  # a tokenizer without <bos>: a document also begins after the end of another
        assert tokenizer.eos_token_id is not None
        ids = [tokenizer.eos_token_id]
    was_training = model.training
    generation = generate(
        ReferenceRuntime(model),
        [ids],
        SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, seed=seed),
        max_new_tokens=max_new_tokens,
        detokenize=lambda: StreamingDecoder(tokenizer),
    )
    text = generation.collect()[0].text
    model.train(was_training)
    return prompt + text
