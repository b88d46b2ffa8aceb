"""Added tokens keep the ids of the file, with ``transformers`` and ``tokenizers`` as the peers."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from gemma3_export.errors import InputError
from gemma3_export.tokenizer import load_tokenizer
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer
from tests.support.tokenizer_corpus import TEXTS

SIZE = 700
PLACEHOLDER = "<image_soft_token>"
TEXT = f"a <|im_start|>user\nthe {PLACEHOLDER} sea<|im_end|>\n<tool>x</tool>"


def entry(content, token_id, *, special=False):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, "special": special, **flags}


# As in a fine-tune: the official placeholder, then its own tokens, of both kinds.
FINE_TUNED = [
    entry(PLACEHOLDER, SIZE, special=True),
    entry("<|im_start|>", SIZE + 1, special=True),
    entry("<tool>", SIZE + 2),
    entry("<|im_end|>", SIZE + 3, special=True),
    entry("</tool>", SIZE + 4),
]


def write_tokenizer(folder: Path, added) -> Path:
    """Write a Gemma tokenizer of 700 tokens with ``added`` after its own added tokens."""
    content = json.loads(tiny_gemma_tokenizer(SIZE)._backend.to_str())
    content["added_tokens"] += added
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_every_added_token_keeps_its_id_when_a_placeholder_comes_before_it(tmp_path):
    path = write_tokenizer(tmp_path, FINE_TUNED)
    source = tokenizers.Tokenizer.from_file(str(path))
    tokenizer = load_tokenizer(path)
    for token in FINE_TUNED:
        assert tokenizer.token_id(token["content"]) == token["id"]
    assert tokenizer.vocab_size == SIZE + 5
    expected = source.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode(TEXT, add_bos=False) == expected
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(TEXT, add_bos=False) == expected
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == expected


def test_ordinary_text_gets_the_ids_of_added_tokens_but_no_special_ones(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, FINE_TUNED))
    ids = tokenizer.encode_ordinary(TEXT)
    assert SIZE + 2 in ids
    assert SIZE + 4 in ids
    assert not tokenizer.special_token_ids & set(ids)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode_ordinary_batch([TEXT, "a"])[0] == ids


def test_a_placeholder_at_the_end_is_dropped(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, FINE_TUNED[:1]))
    assert tokenizer.vocab_size == SIZE
    assert max(tokenizer.encode(TEXT)) < SIZE
    assert tokenizer.decode(tokenizer.encode(PLACEHOLDER)) == PLACEHOLDER


def test_the_order_of_added_tokens_in_the_file_does_not_matter(tmp_path):
    path = write_tokenizer(tmp_path, FINE_TUNED)
    expected = load_tokenizer(path).encode(TEXT)
    content = json.loads(path.read_text())
    random.Random(3).shuffle(content["added_tokens"])
    assert [token["id"] for token in content["added_tokens"]][-5:] != list(range(SIZE, SIZE + 5))
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).encode(TEXT) == expected
    # the same where the list comes last, after a token of the same name
    content["model"]["vocab"]["added_tokens"] = content["model"]["vocab"].pop("▁z")
    content["model"]["merges"].remove(["▁", "z"])
    content["added_tokens"] = content.pop("added_tokens")
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).encode(TEXT) == expected


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ([entry("<|im_end|>", SIZE + 1)], "'<|im_end|>' the id 701, .* as 700"),
        ([*FINE_TUNED[:2], entry("<x>", SIZE + 5)], "'<x>' the id 705, .* as 702"),
        ([entry("e", 5)], "'e' the id 5"),
        ([entry("<x>", SIZE), entry("<y>", SIZE)], "'<y>' the id 700"),
        ([entry("<x>", SIZE), entry("<x>", SIZE + 1)], "'<x>' the id 701"),
        ([entry("<x>", -1)], "'<x>' the id -1|not a valid"),
        ([entry("<x>", "700")], "not a valid"),
    ],
)
def test_an_added_token_that_cannot_keep_its_id_is_an_error(tmp_path, added, named):
    path = write_tokenizer(tmp_path, added)
    with pytest.raises(InputError, match=named.replace("|>", r"\|>").replace("<|", r"<\|")):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("token_id", "content", "message"),
    [
        (SIZE + 3, "<|im_end|>", None),
        (SIZE, PLACEHOLDER, None),
        (SIZE + 5, "<new>", "'<new>' the id 705, but in tokenizer.json it is missing"),
        (SIZE + 2, "<|im_end|>", "the id 702, but in tokenizer.json it has the id 703"),
    ],
)
def test_added_tokens_that_only_the_config_declares_are_errors(
    tmp_path, token_id, content, message
):
    path = write_tokenizer(tmp_path, FINE_TUNED)
    declared = {"added_tokens_decoder": {str(token_id): {"content": content, "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    if message is None:
        load_tokenizer(path)
        return
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = write_tokenizer(tmp_path, FINE_TUNED)
    expected = load_tokenizer(path).encode(TEXT)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert load_tokenizer(path).encode(TEXT) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_as_by_the_source(tmp_path, text):
    path = write_tokenizer(tmp_path, FINE_TUNED)
    source = tokenizers.Tokenizer.from_file(str(path))
    ids = load_tokenizer(path).encode(text, add_bos=False)
    if not text.startswith("<bos>"):
        assert ids == source.encode(text, add_special_tokens=False).ids
