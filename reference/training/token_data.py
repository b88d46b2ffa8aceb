"""Open token folders (memory-mapped ids, tokenizer, metadata) and sample batches from them.

Batches are random windows of the text. Each is a function of the seed and its index alone, because
the generator is counter-based: resuming replays nothing, and every process takes its rows of the
same global batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.config import TOKENIZER_NAME
from gemma3_export.errors import InputError
from gemma3_export.files import check_regular, is_file, to_path
from gemma3_export.records import Count, read_record
from gemma3_export.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "META",
    "SPLITS",
    "TRAIN_STREAM",
    "VALIDATION_STREAM",
    "TokenData",
    "TokenMeta",
    "WindowSampler",
    "open_token_data",
    "token_dtype",
    "tokenizer_fingerprint",
]

META = "meta.json"
SPLITS = ("train", "validation")
FORMAT_VERSION = 1
SCANNED_TOKENS = 2**22  # at once
REMEDY = "prepare the data again"
TRAIN_STREAM, VALIDATION_STREAM = 0, 1  # random streams; validation has its own


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMeta:
    """The metadata of a token folder."""

    format_version: int
    vocab_size: Count
    dtype: str  # uint16 or uint32, little-endian
    tokenizer_fingerprint: str  # see :func:`tokenizer_fingerprint`
    bos_token_id: int | None  # begins every document, if the tokenizer has one
    eos_token_id: int  # ends every document
    tokens: dict[str, Count]  # by split
    documents: dict[str, Count]  # documents that end in the split
    characters: dict[str, Count]  # by split
    source: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the contents of ``meta.json``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenData:
    """An open token folder; the token arrays are memory-mapped."""

    path: Path
    meta: TokenMeta
    train: NDArray[np.unsignedinteger[Any]]
    validation: NDArray[np.unsignedinteger[Any]] | None

    def tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer that produced the ids; None if they were not made from text."""
        if not (self.path / TOKENIZER_NAME).is_file():
            return None
        return Tokenizer.from_folder(self.path)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype that holds every id; Gemma's 262,144 need uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of the bytes of every token, independent of the tokenizer's file format."""
    digest = hashlib.sha256()
    special = tokenizer.special_token_ids
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        digest.update(b"%d %d %d:" % (token_id, token_id in special, len(data)) + data)
    return digest.hexdigest()


def open_token_data(folder: Path | str) -> TokenData:
    """Open a folder that ``gemma3-export data`` wrote, and map its files.

    Raises:
        InputError: the folder is missing, damaged, or of another version.
    """
    folder = to_path(folder, "the data")
    if not is_file(folder / META):
        raise InputError(
            f"{folder} has no {META}; make it with: gemma3-export data TEXT... -o {folder}"
        )
    meta = _read_meta(folder / META)
    train = _map_split(folder, "train", meta)
    if train is None:
        raise InputError(f"{folder} has no training tokens; prepare it again")
    return TokenData(
        path=folder, meta=meta, train=train, validation=_map_split(folder, "validation", meta)
    )


def _read_meta(file: Path) -> TokenMeta:
    meta = read_record(file, TokenMeta, remedy=REMEDY, format_versions=(FORMAT_VERSION,))
    for name in ("tokens", "documents", "characters"):
        if getattr(meta, name).keys() != set(SPLITS):
            raise InputError(
                f"{file} is damaged: {name} must have the keys {' and '.join(SPLITS)}; {REMEDY}"
            )
    dtype = token_dtype(meta.vocab_size).name
    if meta.dtype != dtype:
        raise InputError(
            f"{file} is damaged: dtype is {meta.dtype!r:.20}, but a vocabulary of "
            f"{meta.vocab_size} needs {dtype}; {REMEDY}"
        )
    return meta


def _map_split(
    folder: Path, split: str, meta: TokenMeta
) -> NDArray[np.unsignedinteger[Any]] | None:
    count = meta.tokens[split]
    if count == 0:
        return None
    path, dtype = folder / f"{split}.bin", token_dtype(meta.vocab_size)
    try:
        size = check_regular(path)
        if size != count * dtype.itemsize:
            raise InputError(
                f"{path} has {size} bytes, but {META} requires {count * dtype.itemsize}; it is "
                "truncated or of other data, prepare the data again"
            )
        ids = np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; {REMEDY}") from error
    for start in range(0, ids.size, SCANNED_TOKENS):
        if (largest := int(ids[start : start + SCANNED_TOKENS].max())) >= meta.vocab_size:
            raise InputError(
                f"{path} has the token id {largest}, but the vocabulary of {META} has only "
                f"{meta.vocab_size} tokens; {REMEDY}"
            )
    return ids


class WindowSampler:
    """Samples random windows of ``context_length`` tokens, each with its next tokens.

    Args:
        tokens: token ids of a split.
        context_length: tokens per window.
        batch_size: windows per batch and process.
        seed: seed of the run.
        stream: TRAIN_STREAM or VALIDATION_STREAM, which draw independently.

    Raises:
        InputError: there are fewer tokens than one batch needs.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger[Any]],
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        stream: int,
    ) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.batch_size = batch_size
        self._key = seed + (stream << 64)
        needed = context_length + 1
        if stream == TRAIN_STREAM:
            needed = batch_size * context_length + 1
        if tokens.size < needed:
            raise InputError(
                f"the {'training' if stream == TRAIN_STREAM else 'validation'} text has "
                f"{tokens.size} tokens, but {needed} are needed for {batch_size} windows of "
                f"{context_length} tokens; give more text, or lower --batch-size or "
                "--context-length"
            )

    def batch(self, index: int, *, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Return inputs and labels [B, T] int64: the rank's rows of global batch ``index``."""
        import torch  # here, since preparing data needs no torch

        generator = np.random.Generator(np.random.Philox(key=self._key, counter=index << 128))
        last = self.tokens.size - self.context_length
        starts = generator.integers(0, last, size=self.batch_size * world_size)
        mine = starts[rank * self.batch_size : (rank + 1) * self.batch_size]
        rows = np.stack([self.tokens[start : start + self.context_length + 1] for start in mine])
        windows = torch.from_numpy(rows.astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
