"""Prepare training data: tokenize text into token folders, and train small BPE tokenizers.

Tokenization is parallel and resumable. It writes to a hidden sibling of the output and records its
progress after each batch of documents. After an interruption, the next call with the same text and
tokenizer continues from there. The output appears under its name once it is complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import is_file, to_path
from gemma3_export.limits import BELOW_1, check_integer, check_number
from gemma3_export.progress import Progress
from gemma3_export.records import Count, read_record
from gemma3_export.reference.training.documents import Document, DocumentSource, Split
from gemma3_export.reference.training.token_data import (
    FORMAT_VERSION,
    META,
    SPLITS,
    TokenMeta,
    open_token_data,
    token_dtype,
    tokenizer_fingerprint,
)
from gemma3_export.staging import exclusive, publish, refuse_existing, write_text_atomically
from gemma3_export.tokenizer import Tokenizer
from gemma3_export.tokenizer.tokenizer_json import library_errors

__all__ = ["prepare_tokens", "train_bpe"]

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # at Gemma's ids, 0 to 3
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 2**20  # the trainer allocates for all of it at once
MAX_CHARACTERS = 2**27  # of text to learn merges from; more does not change them
BATCH_PIECES = 512  # encoded at once, on all cores
PLAN, STATE = "plan.json", "progress.json"
START_OVER = "pass --force to start over"
EMPTY_SHA256 = hashlib.sha256().hexdigest()


@dataclass(kw_only=True, slots=True)
class _State:
    """The progress of a preparation."""

    pieces: Count = 0  # of the source that are done
    last_split: Split = "train"  # split of the latest piece
    tokens: dict[str, Count] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, Count] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    characters: dict[str, Count] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    sha256: dict[str, str] = field(default_factory=dict)  # of each split's tokens so far


def prepare_tokens(
    source: DocumentSource,
    tokenizer: Tokenizer,
    output: Path | str,
    *,
    validation_fraction: float = 0.05,
    force: bool = False,
    progress: Progress | None = None,
) -> TokenMeta:
    """Tokenize the documents of ``source`` into the folder ``output``.

    Every document begins with ``<bos>``, if the tokenizer has one, and ends with ``<eos>``, which
    teaches a model to stop. Special tokens that are spelled out in the text are encoded as text.

    Args:
        source: the documents.
        tokenizer: stored along with the tokens.
        output: the folder to create.
        validation_fraction: share of characters held out for validation, spread evenly over the
            text; ignored if the source has a validation split of its own.
        force: replace an existing folder.
        progress: receives the stage, and the bytes of text done and in total.

    Raises:
        InputError: the folder exists, an interrupted preparation of it used another tokenizer or
            other text, or a split would be empty.
        Gemma3ExportError: the disk is full or not writable.
    """
    output = to_path(output, "output")
    check_number("the validation fraction", validation_fraction, 0, BELOW_1)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has neither <eos> nor <|endoftext|> to end documents; choose another one"
        )
    refuse_existing(output, force=force)
    work = output.absolute().with_name(f".{output.name}.preparing")
    plan = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "validation_fraction": validation_fraction,
        "source": source.description,
    }
    lock = work.with_name(work.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock, f"preparing {output}"):
            state = _begin(work, plan, tokenizer, force=force)
            _encode_all(source, tokenizer, work, state, validation_fraction, progress)
            meta = _finish(work, output, plan, state, tokenizer, force=force)
    except OSError as error:
        raise Gemma3ExportError(
            f"preparing {output} failed: {error}; free some disk space and run the command "
            "again, it continues where it stopped"
        ) from error
    return meta


def _begin(work: Path, plan: dict[str, Any], tokenizer: Tokenizer, *, force: bool) -> _State:
    if force or not is_file(work / PLAN):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        tokenizer.save(work)
        write_text_atomically(work / PLAN, json.dumps(plan, indent=2) + "\n")
    found = read_record(work / PLAN, dict[str, Any], remedy=START_OVER)
    for key, difference in (
        ("tokenizer_fingerprint", "another tokenizer"),
        ("source", "other text"),
        ("validation_fraction", "another validation fraction"),
        ("format_version", "another version of this program"),
    ):
        if found.get(key) != plan[key]:
            raise InputError(
                f"an interrupted preparation in {work} used {difference}; finish that one first, "
                "or pass --force to start over"
            )
    if not is_file(work / STATE):
        return _State()
    state = read_record(work / STATE, _State, remedy=START_OVER)
    if state.tokens.keys() ^ set(SPLITS):
        raise InputError(f"{work / STATE} is damaged: it has other splits; {START_OVER}")
    return state


def _encode_all(
    source: DocumentSource,
    tokenizer: Tokenizer,
    work: Path,
    state: _State,
    fraction: float,
    progress: Progress | None,
) -> None:
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        hashes = {}
        for split in SPLITS:
            path, size = work / f"{split}.bin", state.tokens[split] * dtype.itemsize
            files[split] = stack.enter_context(path.open("ab"))
            hashes[split] = _hash_of(path, size)
            if hashes[split].hexdigest() != state.sha256.get(split, EMPTY_SHA256):
                raise InputError(
                    f"{path} is not what an interrupted preparation wrote; pass --force to start "
                    "over"
                )
            files[split].truncate(size)  # drop what was written after the last record
        for batch in _batches(itertools.islice(source, state.pieces, None)):
            encoded = tokenizer.encode_ordinary_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                split = _choose_split(piece, state, fraction)
                marked = _with_separators(piece, ids, tokenizer)
                data = np.asarray(marked, dtype).tobytes()
                files[split].write(data)
                hashes[split].update(data)
                state.tokens[split] += len(marked)
                state.documents[split] += piece.is_end
                state.characters[split] += len(piece.text)
            state.sha256 = {split: found.hexdigest() for split, found in hashes.items()}
            _record(files, work, state, len(batch))
            if progress is not None:
                done = sum(state.characters.values())
                progress("tokenizing", done, max(done, source.size_bytes or 0))


def _hash_of(path: Path, size: int) -> Any:
    """Return the SHA-256 of the first ``size`` bytes of a file, to be continued."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            found.update(block)
            size -= len(block)
    return found


def _choose_split(piece: Document, state: _State, fraction: float) -> Split:
    """Choose validation for a document when the split is half a document behind its share."""
    if piece.split is not None:
        state.last_split = piece.split
    elif piece.is_start or len(piece.text) > 2**13:
        # The pieces of a long document may go to different splits.
        validation, total = state.characters["validation"], sum(state.characters.values())
        is_due = validation + len(piece.text) / 2 <= fraction * (total + len(piece.text))
        state.last_split = "validation" if is_due else "train"
    return state.last_split


def _with_separators(piece: Document, ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    begin = [tokenizer.bos_token_id] if piece.is_start else []
    end = [tokenizer.eos_token_id] if piece.is_end else []
    return [token_id for token_id in (*begin, *ids, *end) if token_id is not None]


def _record(files: dict[str, IO[bytes]], work: Path, state: _State, pieces: int) -> None:
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    state.pieces += pieces
    write_text_atomically(work / STATE, json.dumps(asdict(state)))


def _finish(
    work: Path,
    output: Path,
    plan: dict[str, Any],
    state: _State,
    tokenizer: Tokenizer,
    *,
    force: bool,
) -> TokenMeta:
    if state.tokens["train"] == 0:
        shutil.rmtree(work, ignore_errors=True)
        raise InputError("the text is empty; give files that contain text")
    if plan["validation_fraction"] > 0 and state.tokens["validation"] == 0:
        shutil.rmtree(work, ignore_errors=True)
        raise InputError(
            f"{sum(state.characters.values())} characters are too few to hold out "
            f"{plan['validation_fraction']:.0%} of them for validation; give more text or "
            "--validation-fraction 0"
        )
    assert tokenizer.eos_token_id is not None
    meta = TokenMeta(
        format_version=FORMAT_VERSION,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size).name,
        tokenizer_fingerprint=plan["tokenizer_fingerprint"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tokens=state.tokens,
        documents=state.documents,
        characters=state.characters,
        source=plan["source"],
    )
    write_text_atomically(work / META, json.dumps(meta.to_json(), indent=2) + "\n")
    open_token_data(work)
    for name in (PLAN, STATE):
        (work / name).unlink()
    refuse_existing(output, force=force)  # again: files may have appeared meanwhile
    publish(work, output.absolute())
    shutil.rmtree(work, ignore_errors=True)  # what was replaced
    return meta


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, BATCH_PIECES)):
        yield batch


def train_bpe(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with ``vocab_size`` tokens and Gemma's special tokens.

    Raises:
        InputError: the vocabulary is too small, or the text is too short for it.
    """
    check_integer("the vocabulary size", vocab_size, 1, MAX_VOCAB_SIZE)
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small; 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need at least {MIN_VOCAB_SIZE}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with library_errors("the BPE tokenizer cannot be trained"):
        backend.train_from_iterator(_limited(documents), trainer)
    if backend.get_vocab_size() < vocab_size:
        raise InputError(
            f"the text yields a vocabulary of only {backend.get_vocab_size()} instead of "
            f"{vocab_size}; choose a smaller --vocab-size or give more text"
        )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    return Tokenizer(backend)


def _limited(documents: Iterable[Document]) -> Iterable[str]:
    total = 0
    for document in documents:
        if total > MAX_CHARACTERS:
            return
        total += len(document.text)
        yield document.text
