"""Texts that are certainly too long are rejected before they are encoded."""

import pytest
import tokenizers
from tokenizers import AddedToken, normalizers

from gemma3_export.errors import TextTooLongError
from gemma3_export.tokenizer import Tokenizer
from gemma3_export.tokenizer import tokenizer as tokenizer_module
from tests.support.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_gemma_tokenizer
from tests.support.tokenizer_corpus import TEXTS


@pytest.mark.parametrize("tokenizer", [tiny_gemma_tokenizer(700), tiny_byte_level_tokenizer()])
@pytest.mark.parametrize("control", [True, False])
def test_no_text_is_rejected_that_has_few_enough_tokens(tokenizer, control):
    longest = max(tokenizer._backend.get_vocab(), key=len)
    bombs = ["<bos>" * 50 + "a", longest * 7, " " * 99, "▁" * 40, "\u0915" * 30, ""]
    for text in (*TEXTS, *bombs):
        ids = tokenizer.encode(text, allow_control_tokens=control)
        found = tokenizer.encode(text, allow_control_tokens=control, most=len(ids))
        assert found == ids


@pytest.mark.parametrize("control", [True, False])
def test_a_bomb_never_reaches_the_tokenizer(control, monkeypatch):
    tokenizer = tiny_gemma_tokenizer(700)
    monkeypatch.setattr("gemma3_export.tokenizer.tokenizer._encoding", None)
    bomb = "ab" * 1_000_000
    with pytest.raises(TextTooLongError, match="at most 321 are") as error:
        tokenizer.encode(bomb, allow_control_tokens=control, most=321)
    assert error.value.least > 321
    with pytest.raises(TextTooLongError):
        tokenizer.encode_chat([{"role": "user", "content": f"<eos>{bomb}"}], most=321)


def test_space_that_the_chat_template_trims_does_not_count():
    tokenizer = tiny_gemma_tokenizer(700)
    messages = [{"role": "user", "content": "hi" + " " * 100_000}]
    assert len(tokenizer.encode_chat(messages, most=60)) <= 60


@pytest.mark.parametrize("way", ["strips", "shrinks"])
def test_tokenizers_that_drop_text_have_no_bound(way):
    backend = tokenizers.Tokenizer.from_str(tiny_gemma_tokenizer(700).to_json())
    if way == "strips":
        backend.add_tokens([AddedToken("<end_of_line>", lstrip=True, normalized=False)])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Strip(), backend.normalizer])
    text = " " * 5000 + ("<end_of_line>" if way == "strips" else "")
    assert len(Tokenizer(backend).encode(text, most=8)) <= 8


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"single_word": True}])
@pytest.mark.parametrize("text", ["<bos>" * 3, "<bos><bos> a", "a<bos>", "<bos> <bos>a", "<bos"])
def test_one_bos_remains_of_those_at_the_start(flags, text):
    backend = tokenizers.Tokenizer.from_str(tiny_gemma_tokenizer(700).to_json())
    settings = {"special": True, "normalized": False} | flags
    backend.add_special_tokens([AddedToken("<bos>", **settings)])
    ids = backend.encode(text, add_special_tokens=False).ids
    while ids[:1] == [2]:
        ids = ids[1:]
    assert Tokenizer(backend).encode(text, most=50) == [2, *ids]


def test_many_bos_at_the_start_never_reach_the_tokenizer(monkeypatch):
    tokenizer = tiny_gemma_tokenizer(700)
    texts, encoding = [], tokenizer_module._encoding
    monkeypatch.setattr(
        tokenizer_module, "_encoding", lambda *each: texts.append(each[1]) or encoding(*each)
    )
    assert tokenizer.encode("<bos>" * 1_000_000 + "a", most=50) == tokenizer.encode("a")
    assert texts == ["<bos>a", "a"]
