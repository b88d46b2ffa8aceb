"""Read ``tokenizer.json`` so that every added token keeps the id that the file gives it.

The ``tokenizers`` library numbers added tokens by their order in the file and ignores the ids
stated there. A token that is out of order, or that follows a gap, silently gets another id, and
with it the embedding of another token. So the tokens are sorted before the library sees them, and
compared with the file afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from gemma3_export.config import TOKENIZER_CONFIG_NAME, load_json_object
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import is_file, read_text

__all__ = [
    "IMAGE_PLACEHOLDER",
    "count_json_tokens",
    "library_errors",
    "parse_tokenizer_json",
    "read_tokenizer_json",
]

# The multimodal processor's token. Text models have no embedding for it, unless a fine-tune has
# added tokens with higher ids.
IMAGE_PLACEHOLDER = "<image_soft_token>"
MAX_TOKENIZER_BYTES = 2**28  # Gemma's has 33 MB


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn every error of the tokenizers library into an InputError that says ``what`` failed.

    The library raises Exception for most invalid input, and a Rust panic, which is not even an
    Exception, for some.

    Raises:
        InputError: the library failed.
    """
    try:
        yield
    except (Gemma3ExportError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(
            f"{what}: {error}; text must be a string of Unicode characters without lone surrogates"
        ) from error
    except BaseException as error:
        message = " ".join(str(error).split())
        raise InputError(f"{what}: {message:.200}; get the tokenizer of the model again") from error


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Read a ``tokenizer.json`` for text models; see :func:`parse_tokenizer_json`.

    Raises:
        InputError: the file is missing, truncated, or not a tokenizer; or the
            ``tokenizer_config.json`` next to it declares other added tokens.
    """
    text = read_text(path, limit_bytes=MAX_TOKENIZER_BYTES)
    try:
        backend = parse_tokenizer_json(text)
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    config = path.with_name(TOKENIZER_CONFIG_NAME)
    if is_file(config):
        _check_declared(backend, load_json_object(config).get("added_tokens_decoder"), config)
    return backend


def parse_tokenizer_json(text: str) -> tokenizers.Tokenizer:
    """Parse the contents of a ``tokenizer.json``.

    The image placeholder is dropped if no added token has a higher id; otherwise it stays, and so
    does every id.

    Raises:
        InputError: ``text`` is not a tokenizer, or an added token cannot keep its id.
    """
    with library_errors("is not a valid tokenizer.json"):
        text, kept = _with_added_tokens(text)
        backend = tokenizers.Tokenizer.from_str(text)
    _check_ids(backend, kept)
    return backend


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _Vocabulary(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []


def count_json_tokens(path: Path) -> int | None:
    """Return how many ids a ``tokenizer.json`` names, without building the tokenizer.

    This is ``Tokenizer.vocab_size``; None if the file cannot be read, which whoever needs the
    tokenizer reports.
    """
    try:
        found = msgspec.json.decode(
            read_text(path, limit_bytes=MAX_TOKENIZER_BYTES), type=_Vocabulary
        )
    except (InputError, msgspec.DecodeError, RecursionError):
        return None
    ids = {token.content: token.id for token in found.added_tokens} | found.model.vocab
    ids.pop(IMAGE_PLACEHOLDER, None)
    return max(ids.values(), default=-1) + 1


def _with_added_tokens(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the file with its added tokens as :func:`_arrange` has them, and these tokens."""
    # Parse only the list, which is near the start: parsing all of Gemma's 33 MB takes a second.
    _, found, rest = text.partition('"added_tokens"')
    if found and (tail := rest.lstrip()).startswith(":"):
        start = len(text) - len(tail[1:].lstrip())
        added, end = json.JSONDecoder().raw_decode(text, start)
        if isinstance(added, list):
            kept = _arrange(added)
            return text if kept == added else f"{text[:start]}{json.dumps(kept)}{text[end:]}", kept
    whole = json.loads(text)  # the list is missing, or comes after a token of that name
    kept = _arrange(whole.get("added_tokens") or [])
    return json.dumps(whole | {"added_tokens": kept}), kept


def _arrange(added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort added tokens by id; drop the image placeholder if it is the last."""
    kept = sorted(added, key=lambda token: int(token["id"]))
    if kept and kept[-1]["content"] == IMAGE_PLACEHOLDER:
        kept.pop()
    return kept


def _check_ids(backend: tokenizers.Tokenizer, expected: list[dict[str, Any]]) -> None:
    """Check that the library gave every added token the id of the file.

    Raises:
        InputError: naming the first token with another id.
    """
    found = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    for token in expected:
        content, stated = token["content"], token["id"]
        if found.get(content) != stated:
            raise InputError(
                f"gives the added token {content!r:.80} the id {stated}, but the library reads it "
                f"as {found.get(content)}: an id before it has no token, or two tokens share an "
                "id or a name; number the added tokens without gaps, as save_pretrained does"
            )


def _check_declared(backend: tokenizers.Tokenizer, declared: Any, path: Path) -> None:
    """Check that a ``tokenizer_config.json`` declares no token that ``tokenizer.json`` lacks.

    transformers would add it when it loads the folder.

    Raises:
        InputError: naming the first token that is missing or has another id.
    """
    if not isinstance(declared, dict):
        return
    for stated, token in declared.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or content == IMAGE_PLACEHOLDER:
            continue
        found = backend.token_to_id(content)
        if str(found) != stated:
            raise InputError(
                f"{path}: added_tokens_decoder gives {content!r:.80} the id {stated:.20}, but in "
                f"tokenizer.json it {'is missing' if found is None else f'has the id {found}'}; "
                "load the folder with AutoTokenizer and save it again, so that both files agree"
            )
