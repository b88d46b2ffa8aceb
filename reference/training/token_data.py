"""Open token folders (memory-mapped ids, tokenizer, metadata) and sample batches from them.

Batches are random windows of the text. Each is a function of the seed and its index alone, because
the generator is counter-based: resuming replays nothing, and every process takes its rows of the
same global batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma3_export.config import TOKENIZER_NAME
from gemma3_export.errors import InputError
from gemma3_export.files import check_regular, is_file, to_path
from gemma3_export.records import Count, read_record
from gemma3_export.reference.training.options import LossOn
from gemma3_export.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BEGINS_DOCUMENT",
    "EXAMPLES_VERSION",
    "IGNORED_LABEL",
    "IS_LEARNED",
    "META",
    "SPLITS",
    "TEXT_VERSION",
    "TRAIN_STREAM",
    "VALIDATION_STREAM",
    "Batch",
    "TokenData",
    "TokenMeta",
    "WindowSampler",
    "marks_name",
    "open_token_data",
    "token_dtype",
    "tokenizer_fingerprint",
]

META = "meta.json"
SPLITS = ("train", "validation")
VERSIONS = TEXT_VERSION, EXAMPLES_VERSION = 1, 2  # of the format: without and with marks
IS_LEARNED, BEGINS_DOCUMENT = 1, 2  # bits of a token's mark
IGNORED_LABEL = -100
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
    loss_on: LossOn = "all"
    learned_tokens: dict[str, Count] | None = None  # by split; None: all, and there are no marks

    def to_json(self) -> dict[str, Any]:
        """Return the contents of ``meta.json``; text has those of format version 1."""
        data = asdict(self)
        if self.format_version == TEXT_VERSION:
            del data["loss_on"], data["learned_tokens"]
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenData:
    """An open token folder; the arrays are memory-mapped.

    Examples have a mark for each token, with the bits ``IS_LEARNED`` (the loss counts it) and
    ``BEGINS_DOCUMENT``. Text has none: all of it is learned, in windows that start anywhere.
    """

    path: Path
    meta: TokenMeta
    train: NDArray[np.unsignedinteger[Any]]
    validation: NDArray[np.unsignedinteger[Any]] | None
    train_marks: NDArray[np.uint8] | None = None
    validation_marks: NDArray[np.uint8] | None = None

    def split(
        self, name: str
    ) -> tuple[NDArray[np.unsignedinteger[Any]] | None, NDArray[np.uint8] | None]:
        """Return the tokens and marks of a split."""
        if name == "train":
            return self.train, self.train_marks
        return self.validation, self.validation_marks

    def tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer that produced the ids; None if they were not made from text."""
        if not (self.path / TOKENIZER_NAME).is_file():
            return None
        return Tokenizer.from_folder(self.path)


def marks_name(split: str) -> str:
    """Return the name of the file with the marks of a split's tokens."""
    return f"{split}.marks.bin"


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
        path=folder,
        meta=meta,
        train=train,
        validation=_map_split(folder, "validation", meta),
        train_marks=_map_marks(folder, "train", meta),
        validation_marks=_map_marks(folder, "validation", meta),
    )


def _read_meta(file: Path) -> TokenMeta:
    meta = read_record(file, TokenMeta, remedy=REMEDY, format_versions=VERSIONS)
    for name in ("tokens", "documents", "characters"):
        if getattr(meta, name).keys() != set(SPLITS):
            raise InputError(
                f"{file} is damaged: {name} must have the keys {' and '.join(SPLITS)}; {REMEDY}"
            )
    learned = meta.learned_tokens
    has_marks = learned is not None
    if has_marks != (meta.format_version == EXAMPLES_VERSION):
        raise InputError(
            f"{file} is damaged: format version {meta.format_version} has "
            f"{'no ' if has_marks else ''}learned_tokens; {REMEDY}"
        )
    if learned is not None and learned.keys() != set(SPLITS):
        raise InputError(
            f"{file} is damaged: learned_tokens must have the keys {' and '.join(SPLITS)}; {REMEDY}"
        )
    for name in ("bos_token_id", "eos_token_id"):
        if (token_id := getattr(meta, name)) is not None and not 0 <= token_id < meta.vocab_size:
            raise InputError(
                f"{file} is damaged: {name} is {token_id}, but the vocabulary has "
                f"{meta.vocab_size} tokens; {REMEDY}"
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
    if meta.tokens[split] == 0:
        return None
    path = folder / f"{split}.bin"
    ids = _map_file(path, token_dtype(meta.vocab_size), meta.tokens[split])
    for start in range(0, ids.size, SCANNED_TOKENS):
        if (largest := int(ids[start : start + SCANNED_TOKENS].max())) >= meta.vocab_size:
            raise InputError(
                f"{path} has the token id {largest}, but the vocabulary of {META} has only "
                f"{meta.vocab_size} tokens; {REMEDY}"
            )
    return ids


def _map_file(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    try:
        size = check_regular(path)
        if size != count * dtype.itemsize:
            raise InputError(
                f"{path} has {size} bytes, but {META} requires {count * dtype.itemsize}; it is "
                "truncated or of other data, prepare the data again"
            )
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; {REMEDY}") from error


def _map_marks(folder: Path, split: str, meta: TokenMeta) -> NDArray[np.uint8] | None:
    if meta.learned_tokens is None or meta.tokens[split] == 0:
        return None
    path = folder / marks_name(split)
    marks = _map_file(path, np.dtype(np.uint8), meta.tokens[split])
    learned = int(np.count_nonzero(marks & IS_LEARNED))
    if marks.max() > IS_LEARNED | BEGINS_DOCUMENT or not marks[0] & BEGINS_DOCUMENT:
        raise InputError(f"{path} is damaged: it has marks that have no meaning; {REMEDY}")
    if learned != meta.learned_tokens[split]:
        raise InputError(
            f"{path} marks {learned:,} tokens as learned, but {META} requires "
            f"{meta.learned_tokens[split]:,}; it is damaged or of other data, {REMEDY}"
        )
    return marks


class Batch(NamedTuple):
    """Inputs and labels of one micro-batch, each [B, T] int64.

    Attributes:
        input_ids: token ids.
        labels: next tokens; -100 is not learned.
        documents: tokens see only those with the same number before them; None if all do.
    """

    input_ids: Tensor
    labels: Tensor
    documents: Tensor | None = None


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

    def batch(self, index: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the rank's rows of global batch ``index``."""
        import torch  # here, since preparing data needs no torch

        generator = np.random.Generator(np.random.Philox(key=self._key, counter=index << 128))
        last = self.tokens.size - self.context_length
        starts = generator.integers(0, last, size=self.batch_size * world_size)
        mine = starts[rank * self.batch_size : (rank + 1) * self.batch_size]
        rows = np.stack([self.tokens[start : start + self.context_length + 1] for start in mine])
        windows = torch.from_numpy(rows.astype(np.int64))
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
