"""Small tokenizers of both kinds for end-to-end tests without downloads."""

import itertools
import string
from collections.abc import Iterator

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gemma3_export.tokenizer import Tokenizer
from tests.support.tokenizer_corpus import TEXTS

SPECIAL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
}
MASK_ID = 4  # an ordinary added token; transformers adds its own if there is none
NEWLINE_RUNS = ("\n", "\n\n", "\n\n\n")
MIN_VOCAB_SIZE = 300
Pieces = Iterator[tuple[str, tuple[str, str] | None]]


def tiny_gemma_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer with Gemma's rules and special ids and ``vocab_size`` tokens (>= 300).

    Ids 0 to 4, 105 and 106 are Gemma's special tokens; every byte has a piece, so that any text
    can be encoded. The rest are characters, their merges and finally ``<unusedN>``.
    """
    assert vocab_size >= MIN_VOCAB_SIZE, f"{vocab_size} < {MIN_VOCAB_SIZE}"
    vocab = {**SPECIAL_IDS, "<mask>": MASK_ID}
    taken = set(vocab.values())
    free = (i for i in range(vocab_size) if i not in taken)
    merges: list[tuple[str, str]] = []
    # Pieces come first, or zip would consume an id without using it.
    for (piece, merge), token_id in zip(_pieces(), free, strict=False):
        vocab[piece] = token_id
        if merge:
            merges.append(merge)
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_IDS])
    added = ["<mask>", *(run for run in NEWLINE_RUNS if run in vocab)]
    backend.add_tokens([AddedToken(t, normalized=False) for t in added])
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == vocab_size
    return tokenizer


def tiny_byte_level_tokenizer(vocab_size: int = 600) -> Tokenizer:
    """Return a GPT-2 style tokenizer that ends in ``<|endoftext|>`` and has no ``<bos>``."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return Tokenizer(backend)


def _pieces() -> Pieces:
    """Yield pieces without end, each with the two that it is merged from."""
    yield from ((f"<0x{byte:02X}>", None) for byte in range(256))
    yield from ((text, None) for text in (*NEWLINE_RUNS, "▁"))
    letters = "etaoinshrdlucmfwygpbvkqjxz"
    yield from ((character, None) for character in letters)
    others = sorted(set(string.printable) - set(letters) - set(string.whitespace))
    yield from ((character, None) for character in others)
    yield from (("▁" + letter, ("▁", letter)) for letter in letters)
    pairs = [first + second for first, second in itertools.product(letters, letters)]
    yield from ((pair, (pair[0], pair[1])) for pair in pairs)
    yield from (("▁" + pair, ("▁" + pair[0], pair[1])) for pair in pairs)
    for pair, letter in itertools.product(pairs, letters):
        yield pair + letter, (pair, letter)
    yield from ((f"<unused{number}>", None) for number in itertools.count())
