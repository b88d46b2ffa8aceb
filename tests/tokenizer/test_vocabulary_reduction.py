"""A reduced tokenizer encodes the kept corpus as before, and everything else as bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from gemma3_export.errors import InputError
from gemma3_export.tokenizer import Tokenizer
from gemma3_export.tokenizer.gguf_tokenizer import merges_from_scores
from gemma3_export.tokenizer.settings import TokenizerSettings
from gemma3_export.tokenizer.vocabulary import Reduction, _made_on_the_way, reduce_tokenizer
from tests.support.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_gemma_tokenizer

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
ADDED = ("\n", "\n\n", "<start_of_turn>", "<end_of_turn>", "<unused0>")
ALPHABET = "abcdжя"
NORMAL, USER_DEFINED = 1, 4


def scored_tokenizer(seed: int) -> Tokenizer:
    """Return a tokenizer whose tokens are made by several merges each, as Gemma's are."""
    draw = random.Random(seed)
    pieces = [*SPECIAL, *ADDED, *(f"<0x{byte:02X}>" for byte in range(256))]
    named = len(pieces)
    pieces += [*ALPHABET, "▁", "u", "s", "e", "r"]
    words = {"".join(draw.choices(ALPHABET + "▁", k=draw.randint(2, 5))) for _ in range(150)}
    pieces += [*sorted(words), "us", "er", "user"]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    types = np.array([USER_DEFINED] * named + [NORMAL] * (len(pieces) - named))
    scores = np.array([-draw.randint(1, 60) for _ in pieces], dtype=np.float64)
    merges = [
        (first, second)
        for first, second in merges_from_scores(vocab, types, scores)
        if vocab[first + second] >= named
    ]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return Tokenizer(backend)


def reduce(tokenizer: Tokenizer, request: object) -> Reduction:
    return reduce_tokenizer(tokenizer, str(request), vocab_size=tokenizer.vocab_size)


texts = st.text(alphabet=ALPHABET + "   \n<xé😀", max_size=60)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), texts.filter(str.strip), st.lists(texts, max_size=8))
def test_texts_of_kept_tokens_are_encoded_as_before(
    tmp_path_factory: pytest.TempPathFactory, seed: int, corpus: str, others: list[str]
) -> None:
    full = scored_tokenizer(seed)
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text(corpus, encoding="utf-8", newline="")
    reduction = reduce(full, file)
    reduced, kept = reduction.tokenizer, set(reduction.kept_ids)
    assert reduction.new_ids(full.encode(corpus)) == reduced.encode(corpus)
    for text in [*others, *corpus.split(), *corpus.splitlines()]:
        ids = full.encode(text)
        if kept.issuperset(ids):
            assert reduced.encode(text) == reduction.new_ids(ids)
        assert reduced.decode(reduced.encode(text)) == full.decode(ids)
        assert reduced.token_id("<unk>") not in reduced.encode(text.replace("<unk>", ""))


def test_tokens_keep_their_order_and_their_text(tmp_path: Path) -> None:
    full = scored_tokenizer(1)
    (tmp_path / "corpus.txt").write_text("abc dab ca", encoding="utf-8")
    reduction = reduce(full, tmp_path / "corpus.txt")
    assert list(reduction.kept_ids) == sorted(reduction.kept_ids)
    assert 260 < reduction.tokenizer.vocab_size == len(reduction.kept_ids) < full.vocab_size - 100
    for new, old in enumerate(reduction.kept_ids):
        assert reduction.tokenizer.token_bytes(new) == full.token_bytes(old)
    for token in (*SPECIAL, *ADDED, *(f"<0x{byte:02X}>" for byte in range(256))):
        assert reduction.tokenizer.token_id(token) is not None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert reduction.new_ids([getattr(full, name)]) == [getattr(reduction.tokenizer, name)]
    assert reduction.about == "corpus.txt"


def test_text_without_kept_tokens_becomes_bytes(tmp_path: Path) -> None:
    full = scored_tokenizer(2)
    (tmp_path / "corpus.txt").write_text("ab", encoding="utf-8")
    reduced = reduce(full, tmp_path / "corpus.txt").tokenizer
    ids = reduced.encode("жя", add_bos=False)
    assert [reduced.token_text(token_id) for token_id in ids] == ["�"] * 4
    assert len(full.encode("жя", add_bos=False)) < len(ids)
    assert reduced.decode(ids) == "жя"


def test_scripts_and_languages_choose_by_letters() -> None:
    full = scored_tokenizer(3)
    latin, russian = reduce(full, "latin"), reduce(full, "ru")
    for reduction, kept, dropped in ((latin, "abcd", "жя"), (russian, "жя", "")):
        tokens = {full.token_text(token_id).strip() for token_id in reduction.kept_ids[265:]}
        letters = set("".join(tokens))
        assert letters >= set(kept)
        assert not letters & set(dropped)
    both = reduce(full, "en, ru")
    assert both.kept_ids == tuple(range(full.vocab_size))
    assert both.about == "en,ru"
    for text in ("abca dab", "жяж  abc"):
        assert both.tokenizer.encode(text) == full.encode(text)
    assert latin.tokenizer.encode("abcab dd") == latin.new_ids(full.encode("abcab dd"))


def test_the_words_of_the_chat_template_stay(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<start_of_turn>user\n{{ m.content }}<end_of_turn>{% endfor %}"
    )
    full = scored_tokenizer(4).with_settings(TokenizerSettings(templates={"default": template}))
    (tmp_path / "corpus.txt").write_text("abab", encoding="utf-8")
    reduction = reduce(full, tmp_path / "corpus.txt")
    conversation = [{"role": "user", "content": "abab"}]
    assert reduction.tokenizer.settings == full.settings
    assert full.token_id("user") in reduction.kept_ids
    assert reduction.tokenizer.encode_chat(conversation) == reduction.new_ids(
        full.encode_chat(conversation)
    )


def test_gemmas_tokens_stay_where_they_are(tmp_path: Path) -> None:
    full = tiny_gemma_tokenizer(900)
    (tmp_path / "corpus.txt").write_text("the rest is in the sea\n", encoding="utf-8")
    reduction = reduce(full, tmp_path / "corpus.txt")
    reduced = reduction.tokenizer
    assert reduced.is_gemma
    assert reduced.vocab_size < 420
    reduced.save(tmp_path / "out")
    again = Tokenizer.from_folder(tmp_path / "out")
    state = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    assert state["post_processor"]["special_tokens"]["<bos>"]["ids"] == [2]
    assert again.encode("the sea") == reduction.new_ids(full.encode("the sea"))
    assert again.encode_chat([{"role": "user", "content": "the sea"}]) == reduction.new_ids(
        full.encode_chat([{"role": "user", "content": "the sea"}])
    )


def test_requests_that_are_neither_text_nor_scripts_are_rejected(tmp_path: Path) -> None:
    tokenizer = tiny_gemma_tokenizer(400)
    with pytest.raises(InputError, match=r"'klingon' is unknown; languages: af, am.*latin"):
        reduce(tokenizer, "en,klingon")
    with pytest.raises(InputError, match="neither a text file nor"):
        reduce(tokenizer, tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        reduce(tokenizer, tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        reduce(tokenizer, tmp_path / "binary.txt")
    with pytest.raises(InputError, match="Gemma's type of tokenizer only"):
        reduce(tiny_byte_level_tokenizer(), "en")
    with pytest.raises(InputError, match=r"id 399 .* has no token"):
        reduce_tokenizer(tokenizer, "en", vocab_size=399, needed_ids=[399])


def test_only_tokens_on_the_encoders_own_way_are_kept() -> None:
    ranks = {("b", "c"): 0, ("a", "bc"): 1, ("a", "b"): 2, ("ab", "c"): 3}
    assert set(_made_on_the_way("abc", ranks)) == {"a", "b", "c", "bc", "abc"}


def test_control_tokens_of_one_character_stay_out_of_plain_text(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_gemma_tokenizer(400).to_json())
    backend.add_special_tokens([AddedToken("§", normalized=False)])
    full = Tokenizer(backend)
    file = tmp_path / "corpus.txt"
    file.write_text("the sea", encoding="utf-8")
    reduction = reduce(full, file)
    (control,) = reduction.new_ids([400])
    assert reduction.tokenizer.encode("§", add_bos=False) == [control]
    plain = reduction.tokenizer.encode_ordinary("§")
    assert plain == reduction.new_ids(full.encode_ordinary("§"))
    assert control not in plain
