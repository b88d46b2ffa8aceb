"""A small tokenizer trained on the corpus itself: byte-level BPE with Gemma's special tokens."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from gemma3_export.errors import InputError
from gemma3_export.reference.training.documents import Document
from gemma3_export.tokenizer.tokenizer import Tokenizer

__all__ = ["train_bpe"]

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # at Gemma's ids, 0 to 3
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_CHARACTERS = 2**27  # of text to learn merges from; more would not change them


def train_bpe(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer of exactly ``vocab_size`` tokens; any text can be encoded with it.

    Raises:
        InputError: the vocabulary is too small, or the text has not enough to merge.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"the vocabulary of {vocab_size} is too small; 256 bytes and {len(SPECIAL_TOKENS)} "
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
    backend.train_from_iterator(_limited(documents), trainer)
    if backend.get_vocab_size() < vocab_size:
        raise InputError(
            f"the text yields a vocabulary of {backend.get_vocab_size()} only, not {vocab_size}; "
            "ask for a smaller one or give more text"
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
