"""Load a tokenizer from any supported file format."""

from __future__ import annotations

from pathlib import Path

from gemma3_export.files import to_path
from gemma3_export.tokenizer.settings import settings_from_gguf
from gemma3_export.tokenizer.tokenizer import Tokenizer
from gemma3_export.tokenizer.tokenizer_json import library_errors

__all__ = ["count_tokens", "load_tokenizer"]

TIKTOKEN_PREFIX = "tiktoken:"


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer and its chat templates from a file, a folder, or tiktoken.

    Args:
        path: a ``tokenizer.json``, a folder that contains one, a ``.gguf`` file, or
            ``tiktoken:NAME`` for an encoding of tiktoken.

    Raises:
        InputError: there is no valid tokenizer at ``path``.
        UnavailableError: the package that this type of tokenizer needs is not installed.
    """
    if str(path).startswith(TIKTOKEN_PREFIX):
        from gemma3_export.tokenizer.tiktoken_tokenizer import load_tiktoken

        with library_errors(f"{path} cannot be converted"):
            return load_tiktoken(str(path).removeprefix(TIKTOKEN_PREFIX))
    path = to_path(path, "the tokenizer")
    if path.is_dir():
        return Tokenizer.from_folder(path)
    if path.suffix.lower() != ".gguf":
        return Tokenizer.from_file(path)
    # Imported here because only GGUF files need these modules.
    from gemma3_export.gguf_file import open_gguf
    from gemma3_export.tokenizer.gguf_tokenizer import tokenizer_from_gguf

    with library_errors(f"the tokenizer of {path} cannot be used"):
        reader = open_gguf(path)
        return tokenizer_from_gguf(reader).with_settings(settings_from_gguf(reader))


def count_tokens(path: Path) -> int | None:
    """Return how many token ids a ``tokenizer.json`` or ``.gguf`` file names, without loading it.

    None if it names none, or cannot be read.
    """
    if path.suffix.lower() != ".gguf":
        from gemma3_export.tokenizer.tokenizer_json import count_json_tokens

        return count_json_tokens(path)
    from gemma3_export.gguf_file import open_gguf
    from gemma3_export.tokenizer.gguf_tokenizer import count_gguf_tokens

    return count_gguf_tokens(open_gguf(path))
