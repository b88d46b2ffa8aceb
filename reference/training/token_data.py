"""A folder of token ids: two memory-mapped files, the tokenizer, and a sidecar that says it all."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.config.hugging_face import load_json_object
from gemma3_export.errors import InputError
from gemma3_export.tokenizer.tokenizer import Tokenizer

__all__ = [
    "META",
    "SPLITS",
    "TokenData",
    "TokenMeta",
    "open_token_data",
    "token_dtype",
    "tokenizer_fingerprint",
]

META = "meta.json"
SPLITS = ("train", "validation")
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMeta:
    """What is in a folder of token ids."""

    format_version: int
    vocab_size: int
    dtype: str  # uint16 or uint32, little-endian
    tokenizer_fingerprint: str  # of ids and their bytes; equal tokenizers have equal ones
    bos_token_id: int | None  # begins every document, when the tokenizer has one
    eos_token_id: int  # ends every document
    tokens: dict[str, int]  # by split
    documents: dict[str, int]  # ends of documents, by split
    characters: dict[str, int]  # by split
    source: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The form of the sidecar."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenData:
    """An opened folder; nothing of it is in memory."""

    path: Path
    meta: TokenMeta
    train: NDArray[np.unsignedinteger[Any]]
    validation: NDArray[np.unsignedinteger[Any]] | None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the ids; None for ids that were not made from text."""
        if not (self.path / "tokenizer.json").is_file():
            return None
        return Tokenizer.from_folder(self.path)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest element type that holds every id: uint16 would overflow at Gemma's 262k."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of what each id stands for, whatever file the tokenizer was read from."""
    digest = hashlib.sha256()
    special = tokenizer.special_token_ids
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        digest.update(b"%d %d %d:" % (token_id, token_id in special, len(data)) + data)
    return digest.hexdigest()


def open_token_data(folder: Path) -> TokenData:
    """Map the files of ``folder``, which ``gemma3-export data`` wrote.

    Raises:
        InputError: the folder is absent, damaged, or of another version.
    """
    if not (folder / META).is_file():
        raise InputError(
            f"{folder} has no {META}; make it with: gemma3-export data TEXT... -o {folder}"
        )
    meta = _parse_meta(load_json_object(folder / META), folder / META)
    train = _map_split(folder, "train", meta)
    if train is None:
        raise InputError(f"{folder} has no training tokens; prepare it again")
    return TokenData(
        path=folder, meta=meta, train=train, validation=_map_split(folder, "validation", meta)
    )


def _parse_meta(data: dict[str, Any], where: Path) -> TokenMeta:
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {version!r}, this program knows {FORMAT_VERSION}; "
            "prepare the data again"
        )
    try:
        meta = TokenMeta(**{field.name: data[field.name] for field in fields(TokenMeta)})
        sizes = [meta.tokens[split] for split in SPLITS]
        whole = all(type(size) is int and size >= 0 for size in (*sizes, meta.vocab_size))
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} lacks {error}; prepare the data again") from error
    if not whole or meta.dtype != token_dtype(meta.vocab_size).name:
        raise InputError(f"{where} contradicts itself; prepare the data again")
    return meta


def _map_split(
    folder: Path, split: str, meta: TokenMeta
) -> NDArray[np.unsignedinteger[Any]] | None:
    count = meta.tokens[split]
    if count == 0:
        return None
    path, dtype = folder / f"{split}.bin", token_dtype(meta.vocab_size)
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise InputError(
                f"{path} has {size} bytes where {META} promises {count * dtype.itemsize}; it is "
                "truncated or another's, prepare the data again"
            )
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
