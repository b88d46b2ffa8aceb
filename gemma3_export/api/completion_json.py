"""The result of a generation as JSON data."""

from __future__ import annotations

from typing import Any

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.sampling import SampledToken
from gemma3_export.tokenizer import Tokenizer

__all__ = ["calls_to_json", "logprobs_to_json", "result_to_json"]


def result_to_json(completion: Completion, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what was generated, how it ended, and its seed (null if greedy)."""
    data: dict[str, Any] = {
        "prompt_tokens": completion.prompt_tokens,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
    }
    if completion.is_complete is not None:
        data["is_complete"] = completion.is_complete
    if any(token.logprob is not None for token in completion.tokens):
        data["logprobs"] = [logprobs_to_json(token, tokenizer) for token in completion.tokens]
    return data


def calls_to_json(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the function calls of an answer as JSON data, or why they cannot be read."""
    try:
        _, calls = tokenizer.chat.read_answer(completion.token_ids)
    except InputError as error:
        return {"function_calls": None, "function_calls_error": str(error)}
    return {"function_calls": [{"name": c.name, "arguments": c.arguments} for c in calls]}


def logprobs_to_json(token: SampledToken, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the log-probability of a token, and those of its alternatives."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = None if tokenizer is None else tokenizer.token_text(token_id)
        return {"token_id": token_id, "token": text, "logprob": logprob}

    top = [entry(token_id, logprob) for token_id, logprob in token.top_logprobs]
    return entry(token.token_id, token.logprob) | {"top": top}
