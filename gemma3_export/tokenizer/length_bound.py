"""Bound the number of tokens of a text by its length, so that an over-long one is not encoded.

Encoding takes seconds for megabytes of text, while its length is known at once.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any

import tokenizers
from tokenizers.models import BPE

__all__ = ["most_characters"]


def most_characters(backend: tokenizers.Tokenizer, byte_pieces: Set[str]) -> int | None:
    """Return how many characters of a text a token takes at most.

    None if nothing limits it: a tokenizer that drops text, or has one token for a run of unknown
    characters, may encode any length to few tokens.

    Args:
        backend: the tokenizer.
        byte_pieces: its entries for single bytes. With all of them, no character is unknown.
    """
    model = backend.model
    if not isinstance(model, BPE):
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # they take the space around them
        return None
    normalizer, splitter = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    if not all(map(_keeps_length, normalizer)) or not all(map(_keeps_text, splitter)):
        return None
    reads_bytes = model.byte_fallback or any(part["type"] == "ByteLevel" for part in splitter)
    vocab = backend.get_vocab(with_added_tokens=True)
    if not reads_bytes or not byte_pieces <= vocab.keys():
        return None
    return max(map(len, vocab))


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or a pre-tokenizer, or of the parts of a sequence."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    if state["type"] != "Sequence":
        return [state]
    return list(state.get("normalizers") or state.get("pretokenizers") or [state])


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """Return whether a text is at least as long after the normalizer as before."""
    if normalizer["type"] != "Replace":
        return False
    pattern: dict[str, str] = normalizer["pattern"]  # a String, or a Regex of any length
    return "String" in pattern and len(normalizer["content"]) >= len(pattern["String"])


def _keeps_text(splitter: dict[str, Any]) -> bool:
    """Return whether the pre-tokenizer drops nothing."""
    if splitter["type"] == "Split":
        return bool(splitter["behavior"] != "Removed")
    return splitter["type"] in ("ByteLevel", "Digits")
