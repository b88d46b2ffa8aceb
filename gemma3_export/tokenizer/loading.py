"""Open a tokenizer by its path or name, whatever kind of file holds it."""

from __future__ import annotations

from pathlib import Path

from gemma3_export.tokenizer.tokenizer import Tokenizer

__all__ = ["load_tokenizer"]

TIKTOKEN_PREFIX = "tiktoken:"


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a ``tokenizer.json``, a folder that contains one, a ``.gguf`` file, or
            ``tiktoken:NAME`` for one of tiktoken's encodings.

    Raises:
        InputError: there is no readable tokenizer at ``path``.
        UnavailableError: the package that reads this kind of tokenizer is not installed.
    """
    if str(path).startswith(TIKTOKEN_PREFIX):
        from gemma3_export.tokenizer.tiktoken_tokenizer import load_tiktoken

        return load_tiktoken(str(path).removeprefix(TIKTOKEN_PREFIX))
    path = Path(path)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    if path.suffix.lower() != ".gguf":
        return Tokenizer.from_file(path)
    # Imported here because the thin runtime does not need the gguf package.
    from gemma3_export.gguf_file import open_gguf
    from gemma3_export.tokenizer.gguf_tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(open_gguf(path))
