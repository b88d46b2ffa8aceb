"""Tokenizers for which the ``tokenizers`` library raises an error or panics: one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.reference.training.documents import LocalFiles
from gemma3_export.reference.training.preparation import prepare_tokens
from gemma3_export.tokenizer import Tokenizer, load_tokenizer
from gemma3_export.tokenizer.tokenizer_json import library_errors
from tests.support.command_line import error_line
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

Change = Callable[[dict[str, Any]], object]
TEXT = "the sé " + "x" * 5000

# Changes that the library accepts when it loads the file.
WHEN_ENCODING: dict[str, Change] = {
    "an unknown token without an entry": lambda data: data["model"].update(
        unk_token="nothing", byte_fallback=False
    ),
    "pieces of length 0": lambda data: data.update(
        pre_tokenizer={"type": "FixedLength", "length": 0}
    ),
    "a regular expression that backtracks": lambda data: data.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(x+x+)+y"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "a normalizer with another size": lambda data: data.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAP////8AAAAA"}
    ),
}
# Changes with which it cannot load the file.
WHEN_LOADING: dict[str, Change] = {
    "merges shorter than their prefix": lambda data: data["model"].update(
        continuing_subword_prefix="##"
    ),
    "a normalizer that is not an object": lambda data: data.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a merge of unknown tokens": lambda data: data["model"].update(merges=["qq zz"]),
    "no model": lambda data: data.pop("model"),
    "added tokens of another type": lambda data: data.update(added_tokens=[5]),
}


def is_panic(call: Callable[[], object]) -> bool:
    """Return whether a call of the library fails with a panic, which is not an Exception."""
    try:
        call()
    except Exception:
        return False
    except BaseException:
        return True
    return False


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Path]:
    def write(change: Change) -> Path:
        tiny_gemma_tokenizer(400).save(tmp_path)
        path = tmp_path / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", WHEN_ENCODING)
def test_a_text_that_the_library_cannot_encode(
    changed: Callable[[Change], Path], tmp_path: Path, name: str
) -> None:
    path = changed(WHEN_ENCODING[name])
    tokenizer = load_tokenizer(path)
    calls: tuple[Callable[[], object], ...] = (
        lambda: tokenizer.encode(TEXT),
        lambda: tokenizer.encode_ordinary(TEXT),
        lambda: tokenizer.encode_ordinary_batch([TEXT, TEXT]),
        lambda: prepare_tokens(LocalFiles([tmp_path / "in.txt"]), tokenizer, tmp_path / "out"),
    )
    (tmp_path / "in.txt").write_text(TEXT)
    for call in calls:
        with pytest.raises(InputError, match=r"cannot be encoded: .*; get the tokenizer") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WHEN_LOADING)
def test_a_file_that_the_library_cannot_load(
    changed: Callable[[Change], Path], tmp_path: Path, name: str
) -> None:
    path = changed(WHEN_LOADING[name])
    line = error_line("to-hf", "--weights", "demo", "--tokenizer", path, "-o", tmp_path / "out")
    assert f"{path} is not a valid tokenizer.json: " in line
    assert not (tmp_path / "out").exists()


def test_some_of_these_are_panics(changed: Callable[[Change], Path]) -> None:
    """Otherwise the tests above would not show that panics are handled."""
    backend = tokenizers.Tokenizer.from_file(str(changed(WHEN_ENCODING["pieces of length 0"])))
    assert is_panic(lambda: backend.encode(TEXT))
    text = changed(WHEN_LOADING["merges shorter than their prefix"]).read_text(encoding="utf-8")
    assert is_panic(lambda: tokenizers.Tokenizer.from_str(text))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UnavailableError, MemoryError])
def test_what_is_not_an_error_of_the_library_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), library_errors("it fails"):
        raise error("stop")


def test_a_tokenizer_without_such_faults_encodes(changed: Callable[[Change], Path]) -> None:
    tokenizer = Tokenizer.from_file(changed(lambda data: None))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
