"""`verify --against FOLDER` fails if tokens, templates or stops differ, not only for logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma3_export import export_onnx, verify
from gemma3_export.errors import InputError
from gemma3_export.parity.tokenizer_gate import tokenizer_gate
from gemma3_export.reference.training.model_folder import export_hf_folder
from gemma3_export.reference.weights import open_weights
from tests.support.chat_templates import CHATML
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.tokenizer.test_added_tokens import FINE_TUNED, SIZE, write_tokenizer

ROWS = 768  # a multiple of 64, of which SIZE + 5 have a token
END = SIZE + 3  # <|im_end|>
CONFIG = tiny_config(
    vocab_size=ROWS,
    num_hidden_layers=2,
    layer_types=("sliding_attention", "full_attention"),
    num_attention_heads=4,
    pad_token_id=END,
    eos_token_id=(END, 1),
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": CHATML,
    "bos_token": "<bos>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<unk>",
    "model_max_length": 200,
}


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine-tune")
    write_hf_folder(folder, CONFIG)
    write_tokenizer(folder, FINE_TUNED)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return folder


@pytest.fixture(scope="module")
def bundle(fine_tune: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "bundle"
    return export_onnx(fine_tune, output, target="portable", verify=False, threads=1).path


def test_a_bundle_of_a_fine_tune_passes_against_its_folder(bundle: Path, fine_tune: Path) -> None:
    pytest.importorskip("transformers")
    report = verify(bundle, against=fine_tune, threads=1)
    assert report.passed
    assert report.model.vocab_size == SIZE + 5
    assert [gate.name for gate in report.gates] == ["implementation", "quality", "tokenizer"]
    assert len(report.gates[-1].metrics) == 6


def test_a_converted_folder_has_the_same_tokenizer(fine_tune: Path, tmp_path: Path) -> None:
    with open_weights(str(fine_tune)) as source:
        export_hf_folder(source, tmp_path / "converted")
    gate = tokenizer_gate(tmp_path / "converted", fine_tune)
    assert gate is not None
    assert gate.passed, gate


def edited(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.exists() else {}
        edit(data)
        path.write_text(json.dumps(data))

    return change


def swap(data: dict[str, Any]) -> None:
    """Exchange the ids of two of the fine-tune's tokens."""
    one, other = data["added_tokens"][-1], data["added_tokens"][-2]
    one["content"], other["content"] = other["content"], one["content"]


def no_merges(data: dict[str, Any]) -> None:
    data["model"]["merges"] = data["model"]["merges"][5:]


CHANGES = {
    "tokens with another id": edited("tokenizer.json", swap),
    "added tokens with other rules": edited(
        "tokenizer.json", lambda data: data["added_tokens"][-1].update(lstrip=True)
    ),
    "texts with other tokens": edited("tokenizer.json", no_merges),
    "special tokens": edited("tokenizer_config.json", lambda data: data.update(pad_token="<pad>")),
    "chat templates": edited(
        "tokenizer_config.json", lambda data: data.update(chat_template=CHATML + "!")
    ),
    "token ids of the config": edited(
        "generation_config.json", lambda data: data.update(eos_token_id=[106])
    ),
}


@pytest.mark.parametrize("metric", CHANGES)
def test_every_difference_fails(bundle: Path, fine_tune: Path, tmp_path: Path, metric: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(fine_tune, other)
    CHANGES[metric](other)
    gate = tokenizer_gate(bundle, other)
    assert gate is not None
    assert not gate.passed
    failed = {result.name: result for result in gate.metrics if not result.passed}
    assert metric in failed
    assert failed[metric].where


def test_a_difference_fails_the_whole_check(bundle: Path, fine_tune: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    other = tmp_path / "other"
    shutil.copytree(fine_tune, other)
    CHANGES["chat templates"](other)
    report = verify(bundle, against=other, threads=1)
    assert all(gate.passed for gate in report.gates[:-1])
    assert not report.passed


def test_folders_without_a_tokenizer(bundle: Path, fine_tune: Path, tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "plain", replace(CONFIG, vocab_size=SIZE + 5))
    assert tokenizer_gate(bundle, tmp_path / "plain") is None
    gate = tokenizer_gate(tmp_path / "plain", fine_tune)
    assert gate is not None
    assert [(metric.name, metric.passed) for metric in gate.metrics] == [
        ("missing tokenizer", False)
    ]


def test_a_damaged_tokenizer_is_an_error(bundle: Path, fine_tune: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(fine_tune, other)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a valid tokenizer"):
        tokenizer_gate(bundle, other)
