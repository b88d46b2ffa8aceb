"""Tokenizers converted from tiktoken give the same ids, with and without special tokens."""

import json
import random
import sys
import tokenize
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.tokenizer import load_tokenizer
from gemma3_export.tokenizer.tiktoken_tokenizer import (
    load_tiktoken,
    merge_of_token,
    tokenizer_from_tiktoken,
)
from gemma3_export.tokenizer.tokenizer import piece_bytes
from tests.support.tokenizer_corpus import TEXTS

tiktoken = pytest.importorskip("tiktoken")

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
OLD_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
PATTERNS = {"gpt2": GPT2_PATTERN, "old gpt2": OLD_GPT2_PATTERN, "gpt4": GPT4_PATTERN}


@pytest.fixture(scope="module")
def ranks():
    """Train a byte-level BPE on a module of the standard library."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    source = Path(tokenize.__file__).read_text(encoding="utf-8")
    backend.train_from_iterator([source, *TEXTS], trainer)
    pieces = backend.get_vocab()
    return {piece_bytes(piece, is_byte_level=True): rank for piece, rank in pieces.items()}


def encoding_of(ranks, pattern=GPT2_PATTERN, specials=None):
    specials = {"<|endoftext|>": len(ranks)} if specials is None else specials
    return tiktoken.Encoding(
        "tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
    )


def corpus():
    rng = random.Random(0)
    alphabet = " \n\r\tabZé1234 '’sLL.!_中😀\u00a0\u0301\u2028\x85\x0b$^"  # noqa: RUF001
    yield from TEXTS
    yield Path(random.__file__).read_text(encoding="utf-8")
    for _ in range(2000):
        yield "".join(rng.choices(alphabet, k=rng.randint(1, 40)))


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_equal_those_of_tiktoken(ranks, name):
    encoding = encoding_of(ranks, PATTERNS[name])
    converted = tokenizer_from_tiktoken(encoding)
    assert converted.vocab_size == encoding.n_vocab
    for text in corpus():
        ids = converted.encode_ordinary(text)
        assert ids == encoding.encode_ordinary(text)
        assert converted.decode(ids) == text


@pytest.mark.parametrize("pattern", [r"in$|\w|\W", r"^in|\w|\W", r"[$^]in|\$in|\w|\W"])
def test_anchors_do_not_match_at_line_ends(ranks, pattern):
    assert b"in" in ranks
    encoding = encoding_of(ranks, pattern)
    converted = tokenizer_from_tiktoken(encoding)
    for text in ("in\nin", "in\nin\nin\n", "$in^in$"):
        assert converted.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_special_tokens_keep_their_ids_after_a_gap(ranks):
    specials = {"<|endoftext|>": len(ranks) + 3, "<|other|>": len(ranks) + 7}
    encoding = encoding_of(ranks, specials=specials)
    converted = tokenizer_from_tiktoken(encoding)
    text = "a<|endoftext|><|other|>b"
    assert converted.encode(text) == encoding.encode(text, allowed_special="all")
    assert converted.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert converted.eos_token_id == len(ranks) + 3
    assert converted.bos_token_id is None
    assert converted.decode(converted.encode(text)) == "ab"
    assert converted.vocab_size == len(ranks) + 8


def test_the_saved_tokenizer_needs_no_tiktoken(ranks, tmp_path):
    encoding = encoding_of(ranks)
    tokenizer_from_tiktoken(encoding).save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded.encode_ordinary(text) == encoding.encode_ordinary(text)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "chat_template" not in config


def test_token_without_merges_is_still_found(ranks):
    # tiktoken looks up words before it merges; no part of "zqxj" with two letters is a token.
    ranks = {**ranks, b"zqxj": len(ranks)}
    assert merge_of_token(b"zqxj", ranks) is None
    encoding = encoding_of(ranks, specials={"<|endoftext|>": len(ranks)})
    converted = tokenizer_from_tiktoken(encoding)
    for text in ("zqxj", "zqxjz", " zqxj"):
        assert converted.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_merges_of_a_token_follow_tiktoken():
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"aba": 4, b"abab": 5}
    assert merge_of_token(b"aba", ranks) == (b"ab", b"a")
    assert merge_of_token(b"abab", ranks) == (b"ab", b"ab")
    assert merge_of_token(b"a", ranks) is None


def test_unsupported_encodings_are_errors(ranks):
    with pytest.raises(InputError, match="END"):
        tokenizer_from_tiktoken(encoding_of(ranks, specials={"END": len(ranks)}))
    with pytest.raises(InputError, match=r"\{1,2\}\+"):
        tokenizer_from_tiktoken(encoding_of(ranks, r"(?:\p{N}{1,2}+)x|\s+|\S+"))
    few = {bytes([byte]): byte for byte in range(200)}
    with pytest.raises(InputError, match="56 of the 256 bytes"):
        tokenizer_from_tiktoken(encoding_of(few))


def test_unsupported_tiktoken_version_is_an_error():
    with pytest.raises(UnavailableError, match="version of tiktoken"):
        tokenizer_from_tiktoken(object())


def test_unknown_encoding_is_an_error():
    with pytest.raises(InputError, match=r"'gpt5'; choose one of .*gpt2"):
        load_tiktoken("gpt5")


def test_failed_download_mentions_the_cache_folder(monkeypatch):
    def fail(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UnavailableError, match=r"no route to host.*TIKTOKEN_CACHE_DIR"):
        load_tiktoken("gpt2")


def test_missing_tiktoken_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UnavailableError, match="pip install"):
        load_tiktoken("gpt2")
