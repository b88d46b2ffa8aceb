"""Reading ``tokenizer.json`` into the ``tokenizers`` library, for text models."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from gemma3_export.errors import InputError

__all__ = ["IMAGE_PLACEHOLDER", "parse_tokenizer_json", "read_tokenizer_json"]

# Its id lies outside the text models' vocabulary; only the multimodal processor may use it.
IMAGE_PLACEHOLDER = "<image_soft_token>"


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Read the file at ``path``, leaving out the image placeholder.

    Raises:
        InputError: the file is missing, truncated or no tokenizer.
    """
    try:
        return parse_tokenizer_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the tokenizer {path}: {error}") from error
    except InputError as error:
        raise InputError(f"{path} {error}") from error


def parse_tokenizer_json(text: str) -> tokenizers.Tokenizer:
    """Read the contents of a ``tokenizer.json``, leaving out the image placeholder.

    Raises:
        InputError: ``text`` is no tokenizer.
    """
    try:
        if IMAGE_PLACEHOLDER in text:
            text = _without_image_placeholder(text)
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The library reports broken files with bare Exception, and odd ones with a Rust panic, which
    # is not even an Exception.
    except BaseException as error:
        raise InputError(f"is not a readable tokenizer.json ({error}); fetch it again") from error


def _without_image_placeholder(text: str) -> str:
    """``text`` without the added token that text models have no embedding for."""
    # Only the list is parsed, which comes early: all of Gemma's 33 MB would take a second more.
    _, found, rest = text.partition('"added_tokens"')
    if found and (tail := rest.lstrip()).startswith(":"):
        start = len(text) - len(tail[1:].lstrip())
        added, end = json.JSONDecoder().raw_decode(text, start)
        if isinstance(added, list):
            return f"{text[:start]}{json.dumps(_without_placeholder(added))}{text[end:]}"
    whole = json.loads(text)
    whole["added_tokens"] = _without_placeholder(whole.get("added_tokens") or [])
    return json.dumps(whole)


def _without_placeholder(added: list[dict[str, object]]) -> list[dict[str, object]]:
    return [token for token in added if token["content"] != IMAGE_PLACEHOLDER]
