"""Rebuild Gemma's tokenizer from the metadata of a GGUF file.

A GGUF file stores SentencePiece pieces with scores, but no merges. The merges follow from these:
each way to split a piece into two other pieces is a merge, and pieces with higher scores merge
first. For the official vocabulary, the result equals the official ``tokenizer.json``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from gemma3_export.errors import InputError
from gemma3_export.tokenizer.chat import CONTROL_TOKENS
from gemma3_export.tokenizer.tokenizer import Tokenizer
from gemma3_export.tokenizer.tokenizer_json import IMAGE_PLACEHOLDER

__all__ = ["MetadataReader", "count_gguf_tokens", "merges_from_scores", "tokenizer_from_gguf"]

# Token types of the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Gemma's longest piece has 31 characters. The bounds limit the time of the search for merges, which
# tries every split of every piece, for malicious files.
MAX_PIECE_CHARACTERS = 256
MAX_TOKENS = 2**20
# Converters mark these as control tokens; officially they are added tokens, but not special.
_NOT_SPECIAL = re.compile(r"<mask>|<unused\d+>")
# Control tokens of other chat formats and of FunctionGemma; llama.cpp, too, goes by such names.
_OTHER_CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_function_declaration>",
    "<end_function_declaration>",
    "<start_function_call>",
    "<end_function_call>",
    "<start_function_response>",
    "<end_function_response>",
    "<escape>",
)
_PREFIX = "tokenizer.ggml."
logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_N = TypeVar("_N", int, float)


class MetadataReader(Protocol):
    """The interface that ``gguf_file.GgufFile`` and ``gguf.GGUFReader`` share."""

    def get_field(self, key: str) -> Any:
        """Return an object whose ``contents()`` is the value of ``key``, or None."""


def tokenizer_from_gguf(reader: MetadataReader) -> Tokenizer:
    """Rebuild the tokenizer that the file of ``reader`` was converted from.

    This takes 4 s for Gemma's vocabulary.

    Raises:
        InputError: the file has no Gemma tokenizer, or its metadata is inconsistent.
    """
    _check_kind(reader)
    pieces = _read_pieces(reader)
    types = np.array(_read_numbers(reader, "token_type", len(pieces), int))
    scores = np.array(_read_numbers(reader, "scores", len(pieces), float))
    if not np.isfinite(scores).all():
        raise InputError(f"{_PREFIX}scores has values that are not finite; convert the file again")
    if bad := sorted({int(kind) for kind in types} - set(range(NORMAL, BYTE + 1))):
        raise InputError(f"{_PREFIX}token_type has unknown types {bad[:5]}; convert the file again")
    del pieces[_count_named(pieces, types.tolist()) :]
    if _is_ollamas(reader):
        _retype_user_defined(types, scores)
    _retype_control_tokens(pieces, types)
    # llama.cpp matches these in raw text; Gemma's own file writes their spaces as "▁" too.
    for index in np.flatnonzero(types[: len(pieces)] == USER_DEFINED).tolist():
        pieces[index] = pieces[index].replace(" ", "▁")
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        doubles = [piece for index, piece in enumerate(pieces) if vocab[piece] != index]
        raise InputError(f"{_PREFIX}tokens lists {doubles[0]!r} twice; convert the file again")
    _check_special_ids(reader, vocab)
    merges = merges_from_scores(vocab, types, scores)
    return Tokenizer(_build(vocab, merges, types))


def count_gguf_tokens(reader: MetadataReader) -> int | None:
    """Return how many ids the tokenizer of a GGUF file names, without rebuilding it.

    None if it has no tokenizer or one that is malformed, which whoever needs it reports.
    """
    pieces, types = _contents(reader, "tokens"), _contents(reader, "token_type")
    if not isinstance(pieces, list) or not isinstance(types, list) or len(pieces) != len(types):
        return len(pieces) if isinstance(pieces, list) and types is None else None
    return _count_named(pieces, types)


def _count_named(pieces: Sequence[str], types: Sequence[int]) -> int:
    """Return the number of tokens without those that only fill the rows of a padded embedding."""
    count = len(pieces)
    while count and (types[count - 1] == UNUSED or pieces[count - 1] == IMAGE_PLACEHOLDER):
        count -= 1
    return count


def _is_ollamas(reader: MetadataReader) -> bool:
    """Return whether Ollama converted the file: no other converter writes these two."""
    marks = ("add_padding_token", "add_unknown_token")
    return any(_contents(reader, mark) is not None for mark in marks)


def _retype_user_defined(types: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]) -> None:
    """Give user-defined pieces the type that Ollama's converter does not keep.

    SentencePiece scores them +0, and normal pieces -0, -1, -2 and so on.
    """
    types[(types == NORMAL) & (scores == 0) & ~np.signbit(scores)] = USER_DEFINED


def merges_from_scores(
    vocab: dict[str, int], types: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]
) -> list[tuple[str, str]]:
    """Return all merges, in the order in which they apply.

    They are sorted by the score of the whole piece, then by the lengths of the left and the right
    part, all descending; then by the ids of the whole, the left and the right part, ascending.

    Args:
        vocab: piece to id; ids start at 0 and have no gaps.
        types: GGUF token types by id.
        scores: SentencePiece scores by id.
    """
    pieces = list(vocab)
    # SentencePiece ranks all pieces except normal ones with a score of 0.
    rank = np.where(types == NORMAL, scores, 0.0)
    look_up = vocab.get
    found: list[int] = []  # flat, because half a million tuples are slow to garbage-collect
    for whole, piece in enumerate(pieces):
        if types[whole] in (UNKNOWN, UNUSED):
            continue
        length = len(piece)
        for cut in range(1, length):
            left = look_up(piece[:cut])
            if left is not None:
                right = look_up(piece[cut:])
                if right is not None:
                    found += (whole, left, right, cut, length - cut)
    table = np.array(found, dtype=np.int64).reshape(-1, 5)
    whole_ids, left_ids, right_ids, left_lengths, right_lengths = table.T
    order = np.lexsort(
        (right_ids, left_ids, whole_ids, -right_lengths, -left_lengths, -rank[whole_ids])
    )
    return [
        (pieces[left], pieces[right])
        for left, right in zip(left_ids[order].tolist(), right_ids[order].tolist(), strict=True)
    ]


def _build(
    vocab: dict[str, int], merges: list[tuple[str, str]], types: npt.NDArray[np.int64]
) -> tokenizers.Tokenizer:
    model = models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token="<unk>",  # noqa: S106 -- not a password
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bos_id = vocab["<bos>"]
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", bos_id)]
    )
    added = [
        AddedToken(piece, normalized=False, special=_is_special(piece, kind))
        for piece, kind in zip(vocab, types.tolist(), strict=False)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    return backend


def _is_special(piece: str, kind: int) -> bool:
    return kind == CONTROL and not _NOT_SPECIAL.fullmatch(piece)


def _retype_control_tokens(pieces: list[str], types: npt.NDArray[np.int64]) -> None:
    """Make known control tokens control tokens, whatever type a converter gave them.

    As ordinary pieces, they would be encoded character by character, and printed as text.
    """
    known = {*CONTROL_TOKENS, *_OTHER_CONTROL_TOKENS}
    wrong = [i for i, piece in enumerate(pieces) if piece in known and types[i] != CONTROL]
    if shown := [pieces[i] for i in wrong if types[i] != UNKNOWN]:  # the usual type of <unk>
        logger.warning(
            "the GGUF file does not mark %s as control tokens; they are read as such by name",
            ", ".join(shown),
        )
    types[wrong] = CONTROL


def _check_kind(reader: MetadataReader) -> None:
    kind = _contents(reader, "model")
    if kind is None:
        raise InputError("the GGUF file has no tokenizer; provide a tokenizer.json as well")
    if kind != "llama":
        raise InputError(
            f"the GGUF file has a tokenizer of type {kind!r}, and only Gemma's type 'llama' can be "
            "rebuilt; provide the original tokenizer.json"
        )
    if _contents(reader, "add_space_prefix"):
        raise InputError(
            f"{_PREFIX}add_space_prefix is set, which Gemma 3 does not use; provide the original "
            "tokenizer.json"
        )


def _check_special_ids(reader: MetadataReader, vocab: dict[str, int]) -> None:
    names = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"}
    for name, piece in names.items():
        if piece not in vocab:
            raise InputError(
                f"{_PREFIX}tokens has no {piece}, so this is not a Gemma tokenizer; provide the "
                "original tokenizer.json"
            )
        token_id = _contents(reader, f"{name}_token_id")
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise InputError(
                f"{_PREFIX}{name}_token_id is {token_id!r}; it must be the id of a token; convert "
                "the file again"
            )
        # A fine-tune may end or pad texts with any token, but encoding relies on the other two.
        if name in ("bos", "unknown") and token_id != vocab[piece]:
            raise InputError(
                f"{_PREFIX}{name}_token_id is {token_id!r}, but {piece} is token {vocab[piece]}; "
                "convert the file again"
            )


def _contents(reader: MetadataReader, name: str) -> object:
    """Return the value of a metadata entry, or None if it is missing."""
    field = reader.get_field(_PREFIX + name)
    if field is None:
        return None
    try:
        value: object = field.contents()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{_PREFIX}{name} is not UTF-8 ({error}); convert the file again"
        ) from error
    return value


def _read_array(reader: MetadataReader, name: str, kind: type[_T]) -> list[_T]:
    values = _contents(reader, name)
    if values is None:
        raise InputError(
            f"the GGUF file has no {_PREFIX}{name}; convert it again or provide a tokenizer.json"
        )
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise InputError(
            f"{_PREFIX}{name} is not an array of {kind.__name__}; convert the file again"
        )
    if not 0 < len(values) <= MAX_TOKENS:
        raise InputError(
            f"{_PREFIX}{name} has {len(values)} entries; it must have between 1 and {MAX_TOKENS}"
        )
    return values


def _read_pieces(reader: MetadataReader) -> list[str]:
    pieces = _read_array(reader, "tokens", str)
    for index, piece in enumerate(pieces):
        if not 0 < len(piece) <= MAX_PIECE_CHARACTERS:
            raise InputError(
                f"{_PREFIX}tokens: entry {index} has {len(piece)} characters; it must have "
                f"between 1 and {MAX_PIECE_CHARACTERS}"
            )
    return pieces


def _read_numbers(reader: MetadataReader, name: str, count: int, kind: type[_N]) -> list[_N]:
    values = _read_array(reader, name, kind)
    if len(values) != count:
        raise InputError(
            f"{_PREFIX}{name} has {len(values)} entries for {count} tokens; convert the file again"
        )
    return values
