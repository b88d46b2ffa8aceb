"""The bundled model: small, complete, trained, and reached by its name."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gemma3_export.config import Gemma3Config
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.training.demo import DEMO_OPTIONS, install
from gemma3_export.reference.training.loss_module import LossModule
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.samples import sample_text
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.opening import DEMO_FOLDER
from gemma3_export.tokenizer import Tokenizer

MAX_BYTES = 4 * 10**6


def loss_of(text: str) -> float:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    with open_weights("demo") as source:
        model = load_reference(source)
    module = LossModule(
        model, compute_dtype=torch.float32, loss_chunk_tokens=512, gradient_checkpointing=False
    )
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        return float(module(ids[:, :-1], ids[:, 1:]))


def test_demo_model_is_small_and_has_both_kinds_of_layer() -> None:
    with open_weights("demo") as source:
        config: Gemma3Config = source.config
        assert 1e6 <= config.num_parameters <= 2e6
        assert set(config.layer_types) == {"sliding_attention", "full_attention"}
        Tokenizer.from_folder(DEMO_FOLDER).check_vocab_size(config.vocab_size)
    assert (DEMO_FOLDER / "model.safetensors").stat().st_size <= MAX_BYTES


def test_demo_model_knows_python_and_english() -> None:
    code = "import os\n\n\ndef main():\n    for name in os.listdir(path):\n        return None\n"
    noise = "zq;; vx)( kjw 7f# ]]{ ~~ pwq 09x zzt ^^ bqq vv@@ \n wq%% xx ((( }} kk jqz"
    assert loss_of(code) < 5.0
    assert loss_of(noise) > loss_of(code) + 1.5


def test_record_says_how_the_model_came_about_and_names_no_folder() -> None:
    record = json.loads((DEMO_FOLDER / "training.json").read_text())
    assert TrainOptions.from_json(record["options"]) == DEMO_OPTIONS
    assert record["result"]["steps"] == DEMO_OPTIONS.steps
    assert 0 < record["result"]["best_validation_loss"] < 5
    assert "data_path" not in record
    assert "/" not in json.dumps(record["data"]["source"])


def test_demo_model_writes_words() -> None:
    with open_weights("demo") as source:
        model = load_reference(source)
    text = sample_text(model, Tokenizer.from_folder(DEMO_FOLDER), "def ", 60, seed=1)
    assert text.startswith("def ")
    assert len(text.split()) > 10


def test_retrained_model_can_take_its_place(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in DEMO_FOLDER.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    record = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps(record | {"data_path": "/somewhere"}))
    monkeypatch.setattr("gemma3_export.reference.training.demo.DEMO_FOLDER", tmp_path / "installed")
    install(run)
    installed = {file.name: file.read_bytes() for file in (tmp_path / "installed").iterdir()}
    assert installed == {file.name: file.read_bytes() for file in DEMO_FOLDER.iterdir()}
