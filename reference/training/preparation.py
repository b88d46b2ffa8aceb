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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import is_file, to_path
from gemma3_export.limits import BELOW_1, check_integer, check_number
from gemma3_export.progress import Progress
from gemma3_export.records import Count, read_record
from gemma3_export.reference.training.documents import Document, DocumentSource
from gemma3_export.reference.training.encoding import Encoded, Encoder
from gemma3_export.reference.training.options import LossOn
from gemma3_export.reference.training.rows import Example, Split
from gemma3_export.reference.training.token_data import (
    BEGINS_DOCUMENT,
    EXAMPLES_VERSION,
    IS_LEARNED,
    META,
    SPLITS,
    TEXT_VERSION,
    TokenMeta,
    marks_name,
    open_token_data,
    token_dtype,
    tokenizer_fingerprint,
)
from gemma3_export.staging import publish, reject_existing, sole_writer, write_text_atomically
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
    learned: dict[str, Count] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # tokens
    sha256: dict[str, str] = field(default_factory=dict)  # of each file so far
    spelled: dict[str, Count] = field(default_factory=dict)  # texts per special token


def prepare_tokens(
    source: DocumentSource,
    tokenizer: Tokenizer,
    output: Path | str,
    *,
    validation_fraction: float = 0.05,
    loss_on: LossOn = "answers",
    parse_special_tokens: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> TokenMeta:
    """Tokenize the documents of ``source`` into the folder ``output``.

    Every document begins with ``<bos>``, if the tokenizer has one, and ends with ``<eos>``, which
    teaches a model to stop. Conversations are what the tokenizer's chat template makes of them.
    Special tokens that are spelled out in the text are encoded as text.

    Args:
        source: the documents.
        tokenizer: stored along with the tokens.
        output: the folder to create.
        loss_on: the tokens of conversations and prompt-completion pairs that the loss counts.
        parse_special_tokens: encode special tokens spelled out in plain text as one token each.
        validation_fraction: share of characters held out for validation, spread evenly over the
            text; ignored if the source has a validation split of its own.
        force: replace an existing folder.
        progress: receives the stage, and the bytes of text done and in total.
        warn: receives a line about special tokens that the text spells out.

    Raises:
        InputError: the folder exists, a row cannot be encoded, an interrupted preparation of it
            used another tokenizer or other text, or a split would be empty.
        Gemma3ExportError: the disk is full or not writable.
    """
    output = to_path(output, "output")
    check_number("the validation fraction", validation_fraction, 0, BELOW_1)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has neither <eos> nor <|endoftext|> to end documents; choose another one"
        )
    reject_existing(output, force=force)
    encoder = Encoder(tokenizer, loss_on=loss_on, parse_special_tokens=parse_special_tokens)
    work = output.absolute().with_name(f".{output.name}.preparing")
    plan = {
        "format_version": EXAMPLES_VERSION if source.has_rows else TEXT_VERSION,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "validation_fraction": validation_fraction,
        "encoding": encoder.description,
        "source": source.description,
    }
    try:
        with sole_writer(output, f"preparing {output}"):
            reject_existing(output, force=force)
            state = _begin(work, plan, tokenizer, force=force)
            _encode_all(source, encoder, work, state, validation_fraction, progress)
            meta = _finish(work, output, plan, state, tokenizer, force=force)
    except OSError as error:
        raise Gemma3ExportError(
            f"preparing {output} failed: {error}; free some disk space and run the command "
            "again, it continues where it stopped"
        ) from error
    if warn is not None and state.spelled:
        warn(_warning_of(state.spelled, tokenizer))
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
        ("encoding", "other options or another chat template"),
        ("source", "other text"),
        ("validation_fraction", "another validation fraction"),
        ("format_version", "another version of this program"),
    ):
        if found.get(key) != plan[key]:
            raise InputError(
                f"an interrupted preparation in {work} used {difference}; repeat that command to "
                f"finish it, or {START_OVER}"
            )
    if not is_file(work / STATE):
        return _State()
    state = read_record(work / STATE, _State, remedy=START_OVER)
    counters = (state.tokens, state.documents, state.characters, state.learned)
    if any(counter.keys() ^ set(SPLITS) for counter in counters):
        raise InputError(f"{work / STATE} is damaged: it has other splits; {START_OVER}")
    return state


def _encode_all(
    source: DocumentSource,
    encoder: Encoder,
    work: Path,
    state: _State,
    fraction: float,
    progress: Progress | None,
) -> None:
    dtype = token_dtype(encoder.tokenizer.vocab_size)
    encoder.spelled.update(state.spelled)
    with ExitStack() as stack:
        files: dict[str, _GrowingFile] = {}
        for split in SPLITS:
            names = {f"{split}.bin": dtype.itemsize}
            if source.has_rows:
                names[marks_name(split)] = 1
            for name, itemsize in names.items():
                size = state.tokens[split] * itemsize
                files[name] = _GrowingFile(work / name, size, state.sha256.get(name), stack)
        stack.enter_context(_dropped_if_rejected(work))
        for batch in _batches(itertools.islice(source, state.pieces, None)):
            for encoded in encoder.encode(batch):
                before = state.last_split
                split = _choose_split(encoded, state, fraction)
                files[f"{split}.bin"].write(np.asarray(encoded.token_ids, dtype).tobytes())
                if source.has_rows:
                    marks = bytearray(encoded.marks)
                    if split != before and marks:  # the rest of a document, in the other split
                        marks[0] |= BEGINS_DOCUMENT
                    files[marks_name(split)].write(bytes(marks))
                state.tokens[split] += len(encoded.token_ids)
                learned = np.frombuffer(encoded.marks, np.uint8) & IS_LEARNED
                state.learned[split] += int(np.count_nonzero(learned))
                state.documents[split] += encoded.is_end
                state.characters[split] += encoded.characters
            state.sha256 = {name: file.sha256.hexdigest() for name, file in files.items()}
            state.spelled = dict(encoder.spelled)
            _record(files, work, state, len(batch))
            if progress is not None:
                done = sum(state.characters.values())
                progress("tokenizing", done, max(done, source.size_bytes or 0))


@contextmanager
def _dropped_if_rejected(work: Path) -> Iterator[None]:
    """Remove a preparation whose text is rejected: no later command can continue it."""
    try:
        yield
    except InputError:
        shutil.rmtree(work, ignore_errors=True)
        raise


class _GrowingFile:
    """A file of a preparation, which continues where the last record says.

    Raises:
        InputError: its content is not what was recorded.
    """

    def __init__(self, path: Path, size: int, sha256: str | None, stack: ExitStack) -> None:
        self.file = stack.enter_context(path.open("ab"))
        self.sha256 = _hash_of(path, size)
        if self.sha256.hexdigest() != (sha256 or EMPTY_SHA256):
            raise InputError(f"{path} is not what an interrupted preparation wrote; {START_OVER}")
        self.file.truncate(size)  # drop what was written after the last record

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        self.file.write(data)
        self.sha256.update(data)

    def sync(self) -> None:
        """Write to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


def _hash_of(path: Path, size: int) -> Any:
    """Return the SHA-256 of the first ``size`` bytes of a file, to be continued."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            found.update(block)
            size -= len(block)
    return found


def _choose_split(encoded: Encoded, state: _State, fraction: float) -> Split:
    """Choose validation for a document when the split is half a document behind its share."""
    size = encoded.characters
    if encoded.split is not None:
        state.last_split = encoded.split
    elif encoded.is_start or size > 2**13:
        # The pieces of a long document may go to different splits.
        validation, total = state.characters["validation"], sum(state.characters.values())
        is_due = validation + size / 2 <= fraction * (total + size)
        state.last_split = "validation" if is_due else "train"
    return state.last_split


def _record(files: Mapping[str, _GrowingFile], work: Path, state: _State, pieces: int) -> None:
    for file in files.values():
        file.sync()
    state.pieces += pieces
    write_text_atomically(work / STATE, json.dumps(asdict(state)))


def _warning_of(spelled: Mapping[str, int], tokenizer: Tokenizer) -> str:
    """Say which special tokens the text spells out, and what to do if they are meant."""
    token = max(spelled, key=lambda text: spelled[text])
    named = f"{token!r}" + (f" and {len(spelled) - 1} more" if len(spelled) > 1 else "")
    remedy = "pass --parse-special-tokens if they are meant as such"
    if tokenizer.token_id(token) is None:
        remedy = "the tokenizer lacks it; choose one that has it with --tokenizer if it is meant"
    return (
        f"{spelled[token]:,} texts spell special tokens such as {named}, which are encoded as "
        f"plain characters; {remedy}. For conversations, give JSONL with messages"
    )


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
    has_marks = plan["format_version"] == EXAMPLES_VERSION
    meta = TokenMeta(
        format_version=plan["format_version"],
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size).name,
        tokenizer_fingerprint=plan["tokenizer_fingerprint"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tokens=state.tokens,
        documents=state.documents,
        characters=state.characters,
        source=plan["source"],
        loss_on=plan["encoding"]["loss_on"] if has_marks else "all",
        learned_tokens=state.learned if has_marks else None,
    )
    write_text_atomically(work / META, json.dumps(meta.to_json(), indent=2) + "\n")
    open_token_data(work)
    for name in (PLAN, STATE):
        (work / name).unlink()
    reject_existing(output, force=force)  # again: files may have appeared meanwhile
    publish(work, output.absolute())
    shutil.rmtree(work, ignore_errors=True)  # what was replaced
    return meta


def _batches(documents: Iterator[Document | Example]) -> Iterator[list[Document | Example]]:
    while batch := list(itertools.islice(documents, BATCH_PIECES)):
        yield batch


def train_bpe(documents: Iterable[Document | Example], vocab_size: int) -> Tokenizer:
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


def _limited(documents: Iterable[Document | Example]) -> Iterable[str]:
    total = 0
    for document in documents:
        for text in document.texts() if isinstance(document, Example) else (document.text,):
            if total > MAX_CHARACTERS:
                return
            total += len(text)
            yield text
