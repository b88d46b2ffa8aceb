"""What a prompt may be, and which tokens and texts end the generation that follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gemma3_export.api.options import GenerateOptions
from gemma3_export.errors import InputError
from gemma3_export.limits import MAX_COUNT, shown
from gemma3_export.runtimes.protocol import IntArray
from gemma3_export.tokenizer import ChatMessage, Tokenizer

__all__ = [
    "Prompt",
    "checked_token_ids",
    "is_conversation",
    "is_one_prompt",
    "resolve_stops",
    "shared_length",
]

Prompt = str | Sequence[int] | IntArray | Sequence[ChatMessage]
BINARY = (bytes, bytearray, memoryview)


def is_conversation(prompt: object) -> TypeGuard[Sequence[ChatMessage]]:
    """Return whether ``prompt`` is a list of chat messages."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    return is_list and bool(prompt) and isinstance(prompt[0], Mapping)  # type: ignore[index]


def is_one_prompt(prompt: object) -> bool:
    """Return whether ``prompt`` is a text, token ids or a conversation, and not a list of these.

    Raises:
        InputError: it is none of them.
    """
    if isinstance(prompt, str):
        return True
    if not len(require_prompt(prompt)):
        raise InputError("the prompt is empty; give some text, or at least one token id")
    return isinstance(prompt[0], Integral | Mapping)  # type: ignore[index]


def require_prompt(prompt: object) -> Sequence[Any] | NDArray[Any]:
    """Return ``prompt`` if it can hold token ids, messages or prompts.

    Raises:
        InputError: it cannot; bytes, for instance, would pass for token ids.
    """
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, BINARY)
    if not is_list and not (isinstance(prompt, np.ndarray) and prompt.ndim):
        raise InputError(
            f"a prompt is a text, a list of token ids or a list of messages, not "
            f"{type(prompt).__name__}"
        )
    return prompt  # type: ignore[return-value]


def checked_token_ids(prompt: object) -> list[int]:
    """Return a prompt of token ids as a list of integers.

    Raises:
        InputError: it holds something else, even if that could be made an integer.
    """
    ids = list(require_prompt(prompt))
    for token_id in ids:
        if not isinstance(token_id, Integral) or isinstance(token_id, bool):
            raise InputError(
                f"a list of token ids holds {token_id!r:.60}, which is not an integer; to continue "
                "several prompts, give a list of texts, or a list of lists of token ids"
            )
        if not -MAX_COUNT <= int(token_id) <= MAX_COUNT:  # an array could not hold it
            raise InputError(f"token id {shown(token_id)} is in no vocabulary; check the prompt")
    return list(map(int, ids))


def resolve_stops(
    options: GenerateOptions, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the tokens and the texts that end a generation by its options.

    Raises:
        InputError: a stop token does not exist, or a text can never occur.
    """
    tokens = [_token_id(token, tokenizer, vocab_size) for token in options.stop_token_names]
    texts = []
    for text in options.stop_texts:
        token_id = None if tokenizer is None else tokenizer.token_id(text)
        if tokenizer and token_id is not None and token_id in tokenizer.control_token_ids:
            tokens.append(token_id)
        else:
            _require_visible(text, options, tokenizer)
            texts.append(text)
    return tuple(tokens), tuple(texts)


def _token_id(token: int | str, tokenizer: Tokenizer | None, vocab_size: int) -> int:
    if isinstance(token, Integral):
        if not 0 <= int(token) < vocab_size:
            raise InputError(
                f"stop token {int(token)} does not exist; token ids are from 0 to {vocab_size - 1}"
            )
        return int(token)
    if tokenizer is None:
        raise InputError(
            f"the bundle has no tokenizer, so the stop token {token!r:.60} has no id; give the id"
        )
    token_id = tokenizer.token_id(str(token))
    if token_id is None:
        raise InputError(
            f"the tokenizer has no token {token!r:.60}; stop at the text instead (--stop), or give "
            "the id of a token"
        )
    return token_id


def _require_visible(text: str, options: GenerateOptions, tokenizer: Tokenizer | None) -> None:
    """Check that a stop text has no special token, which is not part of the text of a result."""
    if tokenizer is None or options.show_special_tokens:
        return
    names = map(tokenizer.token_text, sorted(tokenizer.special_token_ids))
    if hidden := [name for name in names if name and name in text]:
        raise InputError(
            f"the stop text {text!r:.60} contains the special token {hidden[0]!r}, which is not "
            "part of the text, so it would never match; give the token alone, or set "
            "show_special_tokens (--show-special)"
        )


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest prefix that two of the prompts share."""
    longest = 0
    for one, other in pairwise(sorted(map(list, prompts))):  # neighbors share the most
        ends = min(len(one), len(other))
        same = next((at for at in range(ends) if one[at] != other[at]), ends)
        longest = max(longest, same)
    return longest
