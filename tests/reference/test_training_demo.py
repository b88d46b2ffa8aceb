"""Test the bundled demo model and its retraining."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import train_demo as demo
from benchmarks.train_demo import DEMO_OPTIONS, install
from gemma3_export.config import Gemma3Config
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.training.loss import LossModule
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.runs import train
from gemma3_export.reference.training.trainer import sample_text
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.opening import DEMO_FOLDER
from gemma3_export.tokenizer import Tokenizer
from tests.support.token_folders import quick_options, random_tokens, write_config, write_tokens

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


def test_demo_model_is_small_and_has_both_layer_types() -> None:
    with open_weights("demo") as source:
        config: Gemma3Config = source.config
        assert 1e6 <= config.num_parameters <= 2e6
        assert set(config.layer_types) == {"sliding_attention", "full_attention"}
        Tokenizer.from_folder(DEMO_FOLDER).check_vocab_size(config.vocab_size)
    assert (DEMO_FOLDER / "model.safetensors").stat().st_size <= MAX_BYTES


def test_demo_model_knows_python_and_english() -> None:
    code = "import os\n\n\ndef main():\n    for name in os.listdir(path):\n        return None\n"
    noise = "zq;; vx)( kjw 7f# ]]{ ~~ pwq 09x zzt ^^ bqq vv@@ \n wq%% xx ((( }} kk jqz"
    assert loss_of(code) < 3.0
    assert loss_of("The function returns a list of the names of the files.\n") < 4.5
    assert loss_of(noise) > loss_of(code) + 3


def test_training_record_is_complete_and_contains_no_local_path() -> None:
    record = json.loads((DEMO_FOLDER / "training.json").read_text())
    assert TrainOptions.from_json(record["options"]) == DEMO_OPTIONS
    assert record["result"]["steps"] == DEMO_OPTIONS.steps
    assert 0 < record["result"]["best_validation_loss"] < 3.5
    assert "data_path" not in record
    assert "/" not in json.dumps(record["data"]["source"])


def test_demo_model_writes_words() -> None:
    with open_weights("demo") as source:
        model = load_reference(source)
    text = sample_text(model, Tokenizer.from_folder(DEMO_FOLDER), "def ", 60, seed=1)
    assert text.startswith("def ")
    assert len(text.split()) > 10


def test_retrained_model_can_replace_the_bundled_one(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in DEMO_FOLDER.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    record = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps(record | {"data_path": "/somewhere"}))
    monkeypatch.setattr("benchmarks.train_demo.DEMO_FOLDER", tmp_path / "installed")
    install(run)
    installed = {file.name: file.read_bytes() for file in (tmp_path / "installed").iterdir()}
    assert installed == {file.name: file.read_bytes() for file in DEMO_FOLDER.iterdir()}


@pytest.mark.parametrize(
    ("share", "exit_code", "said"),
    [(0.9, 0, "-10.00%"), (1.019, 0, "+1.90%"), (1.021, 1, "+2.10%")],
)
def test_retraining_must_reach_the_recorded_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, exit_code: int, said: str
) -> None:
    record = json.loads((DEMO_FOLDER / "training.json").read_text())
    recorded = record["result"]["best_validation_loss"]
    monkeypatch.setattr(demo, "retrain_demo", lambda folder: recorded * share)
    result = CliRunner().invoke(demo.main, ["-o", str(tmp_path)])
    assert result.exit_code == exit_code
    assert (
        f"validation loss {recorded * share:.4f}, recorded {recorded:.4f} ({said}" in result.output
    )


def test_retraining_resumes_only_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tmp_path / "text", random_tokens(400), random_tokens(100, seed=1))
    config = write_config(tmp_path / "config.json")
    options = quick_options(steps=4)

    def begin(source, tokenizer, output, **_):
        shutil.copytree(tmp_path / "text", output, dirs_exist_ok=True)

    def train_small(tokens, run, options, *, size, force, report):
        return train(tokens, run, options, config_path=config, force=force, report=report)

    monkeypatch.setattr(demo, "DEMO_OPTIONS", options)
    monkeypatch.setattr(demo, "train_bpe", lambda source, size: None)
    monkeypatch.setattr(demo, "prepare_tokens", begin)
    monkeypatch.setattr(demo, "train", train_small)
    first = demo.retrain_demo(tmp_path / "out")
    run = tmp_path / "out" / "run"

    def saved_at(step: int) -> int:
        return (run / "checkpoints" / f"step-{step:08d}.pt").stat().st_mtime_ns

    for newest in (run / "checkpoints").glob("step-00000004.*"):
        newest.unlink()
    record = json.loads((run / "training.json").read_text())
    del record["result"]  # as a killed run leaves it
    (run / "training.json").write_text(json.dumps(record))
    kept = saved_at(2)
    assert demo.retrain_demo(tmp_path / "out") == first
    assert saved_at(2) == kept, "the run did not resume after step 2"
    assert demo.retrain_demo(tmp_path / "out") == first
    assert saved_at(2) > kept, "a finished run was not retrained from scratch"
