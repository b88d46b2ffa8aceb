"""Encoding, decoding, streaming, saving and loading of tokenizers."""

import json
import random
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models

from gemma3_export.errors import InputError
from gemma3_export.tokenizer import StreamingDecoder, Tokenizer, load_tokenizer
from tests.support.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_gemma_tokenizer
from tests.support.tokenizer_corpus import TEXTS, official_tokenizer_json


@pytest.fixture(scope="module", params=["gemma-300", "gemma-5000", "byte-level"])
def tokenizer(request):
    kind, _, size = request.param.partition("-")
    return tiny_gemma_tokenizer(int(size)) if kind == "gemma" else tiny_byte_level_tokenizer()


@pytest.fixture(scope="module")
def gemma():
    return tiny_gemma_tokenizer(1000)


@pytest.fixture(scope="session")
def official():
    return Tokenizer.from_file(official_tokenizer_json())


def stream(tokenizer, ids, **options):
    decoder = StreamingDecoder(tokenizer, **options)
    return [decoder.push(token_id) for token_id in ids] + [decoder.flush()]


@pytest.mark.parametrize("vocab_size", [300, 362, 363, 511, 1000, 4096])
def test_tiny_tokenizers_have_the_requested_size_and_gemmas_ids(vocab_size):
    tokenizer = tiny_gemma_tokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    assert [tokenizer.token_id(name) for name in names] == [0, 1, 2, 3, 105, 106]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer.is_gemma


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_returns_the_text(tokenizer, text):
    expected = text
    if tokenizer.is_gemma:  # Gemma's vocabulary cannot represent these otherwise
        expected = text.replace("▁", " ")
    ids = tokenizer.encode_ordinary(text)
    if "<0x41>" in text and tokenizer.is_gemma:
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_agrees_with_the_tokenizers_library(tokenizer, text):
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_complete_without_partial_characters(tokenizer, text):
    parts = stream(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))
    assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")
    assert parts[-1] == ""


def test_streaming_any_ids_equals_decoding_them(tokenizer):
    random_ids = random.Random(0)
    byte_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) >= b"\x80"]
    for round_number in range(300):
        pool = byte_ids if round_number % 2 else range(tokenizer.vocab_size)
        ids = random_ids.choices(pool, k=random_ids.randint(0, 30))
        for skip in (True, False):
            whole = tokenizer.decode(ids, skip_special_tokens=skip)
            assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == whole


def test_stream_that_ends_inside_a_character(gemma):
    ids = gemma.encode_ordinary("\U0001f469\u200d\U0001f469\u200d\U0001f467")
    for length in range(len(ids)):
        parts = stream(gemma, ids[:length])
        assert "".join(parts) == gemma.decode(ids[:length])
        assert "\ufffd" not in "".join(parts[:-1])


def test_invalid_bytes_do_not_affect_their_neighbors(gemma):
    e_acute = [gemma.token_id("<0xC3>"), gemma.token_id("<0xA9>")]
    ids = [*e_acute, gemma.token_id("<0xFF>"), *e_acute, gemma.token_id("a")]
    assert gemma.decode(ids) == "é\ufffdéa"
    assert stream(gemma, ids) == ["", "é", "\ufffd", "", "é", "a", ""]


def test_flushing_resets_the_stream(gemma):
    decoder = StreamingDecoder(gemma)
    assert decoder.push(gemma.token_id("<0xC3>")) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(gemma.token_id("<0xA9>")) == "\ufffd"
    assert decoder.push(gemma.token_id("a")) == "a"


def test_special_tokens_are_skipped_by_default(gemma):
    ids = gemma.encode("hi<end_of_turn>\n<eos>")
    assert gemma.decode(ids) == "hi\n"
    assert gemma.decode(ids, skip_special_tokens=False) == "<bos>hi<end_of_turn>\n<eos>"
    assert "".join(stream(gemma, ids)) == "hi\n"


@pytest.mark.parametrize("text", ["hi", "<bos>hi", "<bos><bos>hi", ""])
def test_exactly_one_bos(gemma, text):
    ids = gemma.encode(text)
    assert ids == [2, *gemma.encode_ordinary(text.replace("<bos>", ""))]
    assert gemma.encode("hi", add_bos=False) == gemma.encode_ordinary("hi")


def test_a_tokenizer_without_bos_adds_none():
    tokenizer = tiny_byte_level_tokenizer()
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_bos=False)
    assert tokenizer.token_text(tokenizer.eos_token_id) == "<|endoftext|>"


def test_ordinary_text_never_yields_special_ids(tokenizer):
    text = "a <bos><eos><end_of_turn><start_of_turn><|endoftext|><pad><unk> b"
    ids = tokenizer.encode_ordinary(text)
    assert not tokenizer.special_token_ids & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_token_ids & set(tokenizer.encode(text, add_bos=False))
    assert tokenizer.encode_ordinary_batch([text, "b"]) == [ids, tokenizer.encode_ordinary("b")]


def test_token_texts_add_up_to_the_text(gemma):
    assert gemma.token_text(gemma.token_id("▁h")) == " h"
    assert gemma.token_text(106) == "<end_of_turn>"
    assert gemma.token_text(gemma.token_id("<0xC3>")) == "\ufffd"
    assert gemma.token_bytes(gemma.token_id("<0xC3>")) == b"\xc3"
    assert gemma.token_bytes(10**6) == gemma.token_bytes(2**40) == b""
    with pytest.raises(InputError, match="-1"):
        gemma.token_text(-1)


@pytest.mark.parametrize("text", ["\ud800", None, b"hi", ["hi"]])
def test_invalid_text_is_an_error(gemma, text):
    with pytest.raises(InputError, match="cannot be encoded"):
        gemma.encode(text)
    with pytest.raises(InputError, match="cannot be encoded"):
        gemma.encode_ordinary_batch([text, 3])


@pytest.mark.parametrize(
    ("rows", "fits"),
    [(999, False), (1000, True), (1256, True), (1257, True), (2000, True), (2002, False)],
)
def test_the_vocabulary_must_fit_the_model(gemma, rows, fits, caplog):
    if fits:
        gemma.check_vocab_size(rows)
        assert ("may generate ids without a token" in caplog.text) == (rows > 1256)
        return
    with pytest.raises(InputError, match=f"1000 tokens, .* {rows}"):
        gemma.check_vocab_size(rows)


@pytest.mark.parametrize("in_vocabulary", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
def test_the_image_placeholder_is_dropped(gemma, tmp_path, in_vocabulary, reordered):
    content = json.loads(gemma._backend.to_str())
    if in_vocabulary:
        content["model"]["vocab"]["<image_soft_token>"] = 1000
        content["model"]["vocab"]["added_tokens"] = 999
    token = {**content["added_tokens"][0], "id": 1000, "content": "<image_soft_token>"}
    content["added_tokens"].append(token)
    if reordered:
        content = dict(reversed(content.items()))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content, indent=2))
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.vocab_size == 1000
    tokenizer.check_vocab_size(1000)
    text = "an <image_soft_token> here"
    assert max(tokenizer.encode(text)) < 1000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a"',
        b'{"added_tokens": [{"id": 1}], "x": "<image_soft_token>"}',
        b'{"added_tokens": [{"content": "<image_soft_token>"',
        b'{"added_tokens": 5, "x": "<image_soft_token>"}',
        b"[" * 100_000 + b'"added_tokens":"<image_soft_token>"',
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}',
    ],
)
def test_invalid_files_are_errors(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for source in (path, tmp_path):
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            load_tokenizer(source)


def test_truncated_and_missing_files_are_errors(gemma, tmp_path):
    gemma.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(InputError, match="get the tokenizer of the model again"):
        load_tokenizer(path)
    path.unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(InputError, match="SentencePiece"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"absent\.json does not exist"):
        load_tokenizer(tmp_path / "absent.json")


def test_unsupported_tokenizer_types_are_errors(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_of_the_file_are_ignored(gemma, tmp_path):
    backend = tokenizers.Tokenizer.from_str(gemma._backend.to_str())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a long enough text"
    assert load_tokenizer(tmp_path).encode(text) == gemma.encode(text)


def test_saving_and_loading_round_trips(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.vocab_size == tokenizer.vocab_size
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        tokenizer.save(tmp_path / "file")


def test_tokenizers_round_trip_through_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_token_id
    assert theirs.bos_token_id == tokenizer.bos_token_id
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_tokenizer(tmp_path / "theirs")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_transformers_adds_no_mask_token(gemma, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = gemma._backend.to_str().replace('"<mask>"', '"<unused>"')
    (tmp_path / "tokenizer.json").write_text(text)
    load_tokenizer(tmp_path).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert max(theirs("<mask>")["input_ids"]) < gemma.vocab_size


def test_the_thin_modules_import_neither_torch_nor_gguf():
    code = (
        "import sys, gemma3_export.tokenizer.tokenizer, gemma3_export.tokenizer.gguf_tokenizer, "
        "gemma3_export.tokenizer.tiktoken_tokenizer; "
        "sys.exit(bool({'torch', 'gguf', 'tiktoken'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.real_weights
def test_the_official_tokenizer_has_gemmas_ids(official):
    assert official.vocab_size == 262_144
    official.check_vocab_size(262_144)
    official.check_vocab_size(262_208)
    assert official.encode("Hello") == [2, 9259]
    assert max(official.encode("a <image_soft_token> b")) < 262_144


@pytest.mark.real_weights
@pytest.mark.parametrize("text", TEXTS)
def test_the_official_tokenizer_streams_every_text(official, text):
    ids = official.encode(text)
    assert ids[1:] == official._backend.encode(text, add_special_tokens=False).ids
    assert official.decode(ids) == official._backend.decode(ids)
    assert "".join(stream(official, ids)) == official.decode(ids)


def test_a_token_that_is_not_unicode_text_is_rejected(gemma):
    with pytest.raises(InputError, match=r"'\\udcff' cannot be looked up.*without lone surrogates"):
        gemma.token_id("\udcff")
