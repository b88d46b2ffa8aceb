"""Test the preparation of token folders, document sources and BPE training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gemma3_export.cli import command_line
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.reference.training import preparation
from gemma3_export.reference.training.documents import (
    PIECE_CHARACTERS,
    Document,
    HubDataset,
    LocalFiles,
    PythonLibrary,
)
from gemma3_export.reference.training.preparation import prepare_tokens, train_bpe
from gemma3_export.reference.training.token_data import open_token_data, token_dtype
from tests.support.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_gemma_tokenizer

TEXT = "the sea is wide and the ship sails on it while birds cry over the grey water"
WORDS = tuple(TEXT.split())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        words = generator.choice(WORDS, size=80)
        (folder / f"{number:02}.txt").write_text(f"{number}. " + " ".join(words) + "\n")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8 no text")
    return folder


def test_documents_are_complete_and_separated(texts: Path, tmp_path: Path) -> None:
    tokenizer = tiny_gemma_tokenizer(400)
    prepare_tokens(LocalFiles([texts]), tokenizer, tmp_path / "out", validation_fraction=0.1)
    data = open_token_data(tmp_path / "out")
    assert data.validation is not None
    found = []
    for ids in (data.train, data.validation):
        ends = np.flatnonzero(ids == tokenizer.eos_token_id) + 1
        assert ends[-1] == len(ids)
        for part in np.split(ids, ends)[:-1]:
            assert part[0] == tokenizer.bos_token_id
            found.append(tokenizer.decode(part.tolist()))
    assert sorted(found) == sorted(file.read_text() for file in texts.glob("*.txt"))
    assert data.meta.documents == {"train": 36, "validation": 4}
    assert data.tokenizer() is not None


def test_special_tokens_in_the_text_are_encoded_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<eos><bos>two " * 30)
    tokenizer = tiny_gemma_tokenizer(400)
    source = LocalFiles([tmp_path / "a.txt"])
    prepare_tokens(source, tokenizer, tmp_path / "out", validation_fraction=0)
    data = open_token_data(tmp_path / "out")
    assert (data.train == tokenizer.eos_token_id).sum() == 1
    assert (data.train == tokenizer.bos_token_id).sum() == 1
    assert data.validation is None


def test_long_documents_have_one_pair_of_separators(tmp_path: Path) -> None:
    text = "".join(f"line {number} of a long book\n" for number in range(5000))
    (tmp_path / "book.txt").write_text(text)
    pieces = list(LocalFiles([tmp_path / "book.txt"]))
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text) <= PIECE_CHARACTERS for piece in pieces)
    assert [piece.is_start for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.is_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces)


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(2048, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_dtype_holds_every_id(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1
    assert token_dtype(262_144).name == "uint32"


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    monkeypatch.setattr(preparation, "BATCH_PIECES", 5)
    record, calls = preparation._record, iter(range(batches))

    def dying(files, *rest):
        if next(calls, None) is None:
            files["train.bin"].file.write(b"half a batch that was never recorded")
            files["train.bin"].file.flush()
            raise KeyboardInterrupt
        record(files, *rest)

    monkeypatch.setattr(preparation, "_record", dying)


def test_interrupted_preparation_resumes_to_identical_files(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, source = tiny_gemma_tokenizer(400), LocalFiles([texts])
    prepare_tokens(source, tokenizer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(source, tokenizer, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    encoded: list[int] = []
    encode = type(tokenizer).encode_ordinary_batch

    def counting(self, batch):
        encoded.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(type(tokenizer), "encode_ordinary_batch", counting)
    prepare_tokens(source, tokenizer, tmp_path / "parts")
    assert sum(encoded) == 40 - 3 * 5, "what was recorded is not done again"
    for name in ("train.bin", "validation.bin", "meta.json", "tokenizer.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_resuming_with_another_tokenizer_or_text_is_an_error(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(LocalFiles([texts]), tiny_gemma_tokenizer(400), tmp_path / "out")
    with pytest.raises(InputError, match="used another tokenizer"):
        prepare_tokens(LocalFiles([texts]), tiny_gemma_tokenizer(401), tmp_path / "out")
    (texts / "new.txt").write_text("more text")
    with pytest.raises(InputError, match="used other text"):
        prepare_tokens(LocalFiles([texts]), tiny_gemma_tokenizer(400), tmp_path / "out")
    prepare_tokens(LocalFiles([texts]), tiny_gemma_tokenizer(401), tmp_path / "out", force=True)
    assert open_token_data(tmp_path / "out").meta.vocab_size == 401


def test_existing_folder_is_not_overwritten(texts: Path, tmp_path: Path) -> None:
    prepare_tokens(LocalFiles([texts]), tiny_gemma_tokenizer(400), tmp_path / "out")
    with pytest.raises(InputError, match="pass --force"):
        prepare_tokens(LocalFiles([texts]), tiny_gemma_tokenizer(400), tmp_path / "out")


def test_trained_bpe_encodes_any_text(texts: Path) -> None:
    tokenizer = train_bpe(LocalFiles([texts]), 300)
    assert tokenizer.vocab_size == 300
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert special == (0, 1, 2), "as Gemma has them"
    for text in ("the sea is wide", "Ünïcode 海 🌊\t\n  x", "<eos> <bos>"):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert len(tokenizer.encode_ordinary("the sea")) < len("the sea")


def test_bpe_vocabulary_must_be_reachable(texts: Path) -> None:
    with pytest.raises(InputError, match="at least 260"):
        train_bpe(LocalFiles([texts]), 100)
    with pytest.raises(InputError, match="instead of 5000"):
        train_bpe(LocalFiles([texts]), 5000)


def test_byte_level_tokenizer_without_bos_has_one_separator(texts: Path, tmp_path: Path) -> None:
    tokenizer = tiny_byte_level_tokenizer(600)
    meta = prepare_tokens(LocalFiles([texts]), tokenizer, tmp_path / "out")
    assert meta.bos_token_id is None
    data = open_token_data(tmp_path / "out")
    assert (data.train == tokenizer.eos_token_id).sum() == meta.documents["train"]


class TwoSplits:
    """A source with a validation split of its own."""

    def __init__(self):
        self.description = {"kind": "two splits"}
        self.has_rows = False
        self.warnings = ()
        self.size_bytes = None

    def __iter__(self):
        for number in range(10):
            split = "train" if number < 7 else "validation"
            yield Document(text=f"story {number}", split=split)


def test_validation_split_of_a_source_is_kept(tmp_path: Path) -> None:
    meta = prepare_tokens(TwoSplits(), tiny_gemma_tokenizer(400), tmp_path / "out")
    assert meta.documents == {"train": 7, "validation": 3}


def test_python_library_yields_the_same_documents_again() -> None:
    source = PythonLibrary()
    first = [document for document, _ in zip(source, range(40), strict=False)]
    assert first == [document for document, _ in zip(PythonLibrary(), range(40), strict=False)]
    assert any("statement" in document.text for document in first)
    assert not any("test" in file.parts for file in source.files)


def test_damaged_token_folder_is_an_error(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_tokens(LocalFiles([texts]), tiny_gemma_tokenizer(400), out)
    train = out / "train.bin"
    train.write_bytes(train.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train.bin has \d+ bytes, but meta.json requires"):
        open_token_data(out)
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | {"vocab_size": 70_000}))
    with pytest.raises(InputError, match="but a vocabulary of 70000 needs uint32"):
        open_token_data(out)
    (out / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))
    with pytest.raises(InputError, match="format version 99"):
        open_token_data(out)
    with pytest.raises(InputError, match="gemma3-export data"):
        open_token_data(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "is not UTF-8 text"),
        ("blank.txt", b" \n\n ", "the text is empty"),
        ("short.txt", b"a few words", "too few to hold out 5% of them for validation"),
    ],
)
def test_unusable_text_files_are_errors(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    tokenizer = tiny_gemma_tokenizer(400)
    with pytest.raises(InputError, match=message):
        prepare_tokens(LocalFiles([tmp_path / name]), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_dataset_package_is_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = ["data", "--dataset", "roneneldan/TinyStories", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 3
    assert "gemma3-export[train]" in result.output


def test_unreachable_dataset_is_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Offline:
        @staticmethod
        def load_dataset(name: str):
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(UnavailableError, match=r"no route to host.*give text files"):
        HubDataset()


def test_dataset_rows_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": ["one", "", "two", "three"]})
    held = datasets.Dataset.from_dict({"text": ["four"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": train, "validation": held})
    found = [(document.text, document.split) for document in HubDataset(limit=3)]
    assert found == [("one", "train"), ("two", "train"), ("four", "validation")]
    with pytest.raises(InputError, match="no column 'story', only"):
        HubDataset(column="story")


def test_command_prepares_a_token_folder(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["data", str(texts), "--vocab-size", "300", "-o", str(out)]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    assert "gemma3-export train" in result.output
    assert open_token_data(out).meta.vocab_size == 300
    result = CliRunner().invoke(command_line, [*arguments, "--tokenizer", "x.json"])
    assert result.exit_code == 2


def test_command_accepts_a_tiktoken_tokenizer(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    pattern = r" ?\w+| ?[^\s\w]+|\s+"
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    out = tmp_path / "out"
    arguments = ["data", str(texts), "--tokenizer", "tiktoken:gpt2", "-o", str(out)]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    data = open_token_data(out)
    assert (data.meta.vocab_size, data.meta.eos_token_id, data.meta.bos_token_id) == (
        259,
        258,
        None,
    )
    first = (texts / "00.txt").read_text()
    ids = [int(token) for token in data.train[: np.flatnonzero(data.train == 258)[0]]]
    written = [encoding.decode(ids), first, (texts / "01.txt").read_text()]
    assert ids == encoding.encode_ordinary(written[0])
    assert written[0] in written[1:], "the first document, or the second if that one is held out"
