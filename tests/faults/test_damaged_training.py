"""Damaged token folders and runs: one line with the file, the value and the remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.reference.training import checkpoints
from gemma3_export.reference.training.metrics import read_metrics_log
from gemma3_export.reference.training.runs import resume_training, train
from gemma3_export.reference.training.token_data import open_token_data
from tests.support.command_line import error_line
from tests.support.token_folders import (
    VOCAB_SIZE,
    quick_options,
    random_tokens,
    write_config,
    write_tokens,
)

Damage = Callable[[Path], object]
MISSING = object()


def changed(file: str, **values: object) -> Damage:
    """Return the damage of other values in a JSON file; a dot in a name descends."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        for name, value in values.items():
            *parents, last = name.split("__")
            place = data
            for parent in parents:
                place = place[parent]
            if value is MISSING:
                del place[last]
            else:
                place[last] = value
        (folder / file).write_text(json.dumps(data))

    return damage


def content(file: str, data: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(data)


def fifo(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return damage


def folder_at(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def with_id(token_id: int, split: str = "train") -> Damage:
    def damage(folder: Path) -> None:
        ids = np.fromfile(folder / f"{split}.bin", "<u2")
        ids[len(ids) // 2] = token_id
        ids.tofile(folder / f"{split}.bin")

    return damage


META_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no file": (lambda folder: (folder / "meta.json").unlink(), r"has no meta\.json"),
    "empty": (content("meta.json", b""), r"meta\.json is damaged: Input data was truncated"),
    "not UTF-8": (content("meta.json", b'{"a": "\xff"}'), r"meta\.json is damaged"),
    "a list": (content("meta.json", b"[]"), r"meta\.json is damaged: it is \[\]"),
    "a number": (content("meta.json", b"5"), r"meta\.json is damaged: it is 5"),
    "nested": (content("meta.json", b"[" * 9**5), "levels of nesting|truncated"),
    "a FIFO": (fifo("meta.json"), r"meta\.json"),
    "no version": (changed("meta.json", format_version=MISSING), "format_version is missing"),
    "another version": (changed("meta.json", format_version=9), "has format version 9"),
    "no tokens": (changed("meta.json", tokens=MISSING), "tokens is missing; prepare the data"),
    "no eos": (changed("meta.json", eos_token_id=MISSING), "eos_token_id is missing"),
    "an unknown key": (changed("meta.json", tokns=1), "tokns is unknown"),
    "eos a string": (changed("meta.json", eos_token_id="1"), 'eos_token_id is "1"'),
    "eos beyond": (changed("meta.json", eos_token_id=20), "eos_token_id is 20, but the vocab"),
    "bos negative": (changed("meta.json", bos_token_id=-1), "bos_token_id is -1, but"),
    "tokens null": (changed("meta.json", tokens=None), "tokens is null; it must be an object"),
    "no split": (changed("meta.json", tokens__validation=MISSING), "tokens must have the keys"),
    "another split": (changed("meta.json", tokens__test=5), "tokens must have the keys"),
    "tokens negative": (changed("meta.json", tokens__train=-5), r"tokens\.train is -5"),
    "tokens a float": (changed("meta.json", tokens__train=800.5), r"tokens\.train is 800\.5"),
    "tokens true": (changed("meta.json", tokens__train=True), r"tokens\.train is true"),
    "tokens huge": (changed("meta.json", tokens__train=2**62), r"train\.bin has 1600 bytes"),
    "vocabulary huge": (changed("meta.json", vocab_size=2**70), f"vocab_size is {2**70}"),
    "vocabulary 0": (changed("meta.json", vocab_size=0), "but the vocabulary has 0 tokens"),
    "another dtype": (changed("meta.json", dtype="uint32"), "dtype is 'uint32', but"),
    "source null": (changed("meta.json", source=None), "source is null"),
    "train.bin missing": (lambda folder: (folder / "train.bin").unlink(), "does not exist"),
    "train.bin short": (content("train.bin", b"\0" * 7), "train.bin has 7 bytes"),
    "train.bin a FIFO": (fifo("train.bin"), "train.bin is a FIFO"),
    "train.bin a folder": (folder_at("train.bin"), "train.bin is a folder"),
    "an id beyond": (with_id(VOCAB_SIZE), "train.bin has the token id 20, but"),
    "a late id beyond": (with_id(65535, "validation"), "validation.bin has the token id 65535"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token folder and a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    write_tokens(folder / "tokens", random_tokens(800), random_tokens(300, seed=1))
    write_config(folder / "config.json")
    train(
        folder / "tokens",
        folder / "run",
        quick_options(steps=4, eval_interval=2),
        config_path=folder / "config.json",
        report=lambda line: None,
    )
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(trained, tmp_path / "copied"))
    changed("training.json", data_path=str(copied / "tokens"))(copied / "run")
    return copied


@pytest.mark.parametrize("name", META_DAMAGE)
def test_a_damaged_token_folder_is_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    damage, complaint = META_DAMAGE[name]
    damage(folder / "tokens")
    with pytest.raises(InputError, match=complaint) as caught:
        open_token_data(folder / "tokens")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    output = tmp_path / "out"
    line = error_line("train", folder / "tokens", "--config", folder / "config.json", "-o", output)
    assert str(folder / "tokens") in line
    assert not output.exists()


def test_an_intact_token_folder_opens(folder: Path) -> None:
    assert open_token_data(str(folder / "tokens")).train.size == 800


RUN_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no record": (lambda run: (run / "training.json").unlink(), r"is not a run \(no training"),
    "empty record": (content("training.json", b""), r"training\.json is damaged"),
    "a list": (content("training.json", b"[]"), r"training\.json is damaged: it is \[\]"),
    "no version": (changed("training.json", format_version=MISSING), "format_version is missing"),
    "no options": (changed("training.json", options=MISSING), "options is missing; start a new"),
    "no data": (changed("training.json", data=MISSING), "data is missing"),
    "data null": (changed("training.json", data=None), "data is null"),
    "no data path": (changed("training.json", data_path=MISSING), "give DATA"),
    "data path a list": (changed("training.json", data_path=["x"]), r"data_path is \[.x.\]"),
    "data path gone": (changed("training.json", data_path="/nowhere"), r"/nowhere has no meta"),
    "other data": (changed("training.json", data__tokens__train=801), "is not the data that"),
    "an unknown key": (changed("training.json", extra=1), "extra is unknown"),
    "an unknown option": (changed("training.json", options__warp=1), "unknown or missing fields"),
    "a missing option": (changed("training.json", options__seed=MISSING), "seed"),
    "an option of a type": (changed("training.json", options__steps="4"), 'steps is "4"'),
    "an option out of range": (changed("training.json", options__batch_size=0), "batch_size is 0"),
    "a huge option": (changed("training.json", options__seed=2**64), rf"seed is {2**64}"),
    "a damaged log": (content("log.csv", b"step,tokens\n1,2\n"), r"log\.csv is damaged in line 1"),
    "a binary log": (content("log.csv", b"\xff\xfe\n"), r"log\.csv is not UTF-8"),
    "a log with NULs": (content("log.csv", b"\0\0\0\n"), r"log\.csv is damaged in line 1"),
    "a log that is a FIFO": (fifo("log.csv"), r"log\.csv is a FIFO"),
    "a log that is a folder": (folder_at("log.csv"), r"log\.csv is a folder"),
    "no config": (lambda run: (run / "config.json").unlink(), r"config\.json does not exist"),
    "a config of another model": (
        changed("config.json", hidden_size=64),
        r"config\.json was changed since the run began: hidden_size is 64 instead of",
    ),
}


@pytest.mark.parametrize("name", RUN_DAMAGE)
def test_a_damaged_run_is_one_line(folder: Path, name: str) -> None:
    damage, complaint = RUN_DAMAGE[name]
    damage(folder / "run")
    before = sorted(path.name for path in (folder / "run").rglob("*"))
    with pytest.raises(InputError, match=complaint) as caught:
        resume_training(str(folder / "run"), report=lambda line: None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert sorted(path.name for path in (folder / "run").rglob("*")) == before
    assert not list(folder.glob(".run*"))


def row(**values: object) -> str:
    default: dict[str, object] = {
        "step": 1,
        "tokens": 64,
        "train_loss": 2.5,
        "validation_loss": "",
        "learning_rate": 0.1,
        "gradient_norm": 1.5,
        "tokens_per_second": 100.0,
        "mfu": 0.5,
    }
    return ",".join(map(str, (default | values).values())) + "\n"


HEADER = (
    ",".join(("step", "tokens", "train_loss", "validation_loss", "learning_rate", "gradient_norm"))
    + ",tokens_per_second,mfu\n"
)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (row(step="one"), "line 2"),
        (row(step=""), "line 2"),
        (row() + row(step=2, train_loss="x"), "line 3"),
        (row() + row(step=2, train_loss=""), "line 3"),
        (row() + "2,3\n", "line 3"),
        (row() + row(step=1), "line 3: step 1 follows step 1"),
        (row(step=-1), "line 2"),
        (row() + '"2,3\n', "line"),
    ],
)
def test_a_damaged_line_of_the_log_is_named(tmp_path: Path, lines: str, complaint: str) -> None:
    (tmp_path / "log.csv").write_text(HEADER + lines)
    with pytest.raises(InputError, match=rf"log\.csv is damaged in {complaint}.*repair it"):
        read_metrics_log(tmp_path)


def test_an_intact_log_is_read_without_its_last_torn_line(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        HEADER + row() + row(step=2, validation_loss=3.5) + "3,4,nonsense"
    )
    first, second = read_metrics_log(tmp_path)
    assert (first.step, first.validation_loss, first.train_loss) == (1, None, 2.5)
    assert (second.step, second.validation_loss, second.mfu) == (2, 3.5, 0.5)


def test_files_that_are_no_checkpoints_are_passed_over(folder: Path) -> None:
    place = folder / "run" / "checkpoints"
    for name in ("step-abc.pt", "step-.pt", "step-1.pt", "step--0000001.pt", "step-0000000x.pt"):
        (place / name).write_bytes(b"x")
    (place / f"step-{'9' * 200}.pt").write_bytes(b"x")
    lines: list[str] = []
    result = resume_training(folder / "run", report=lines.append)
    assert result.state.step == 4
    assert "resuming after step 4" in lines


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (content("step-00000004.json", b"{}"), "step is missing"),
        (content("step-00000004.json", b'{"step": 4, "size_bytes": "9", "sha256": ""}'), '"9"'),
        (content("step-00000004.json", b"[]"), r"it is \[\]"),
        (lambda place: (place / "step-00000004.json").unlink(), "is incomplete"),
        (content("step-00000004.pt", b"PK"), "is truncated"),
        (fifo("step-00000004.pt"), "is a FIFO"),
        (folder_at("step-00000004.pt"), "is a folder"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    folder: Path, damage: Damage, complaint: str
) -> None:
    damage(folder / "run" / "checkpoints")
    lines: list[str] = []
    state = checkpoints.load_latest_checkpoint(folder / "run", lines.append)
    assert state["progress"]["step"] == 2
    (line,) = lines
    assert complaint.replace("\\", "") in line


@pytest.mark.parametrize("key", ["model", "optimizer", "scaler", "random", "progress"])
def test_a_checkpoint_of_something_else_is_rejected(folder: Path, key: str) -> None:
    state: dict[str, Any] = checkpoints.load_latest_checkpoint(folder / "run", print)
    del state[key]
    checkpoints.save_checkpoint(folder / "run", 9, state, keep=1)
    with pytest.raises(InputError, match="does not hold the state of this run"):
        resume_training(folder / "run", report=lambda line: None)


def test_a_full_disk_at_the_first_checkpoint_does_not_advise_to_resume(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []

    def full(state: object, file: object) -> None:
        saves.append(1)
        if len(saves) > allowed:
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left")
        save(state, file)

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    for allowed, advice in ((0, "start again"), (1, "the checkpoint of step 2 is kept.*resume")):
        saves.clear()
        with pytest.raises(Gemma3ExportError, match=advice) as caught:
            train(
                trained / "tokens",
                tmp_path / f"run{allowed}",
                quick_options(steps=8),
                config_path=trained / "config.json",
                report=lambda line: None,
            )
        assert ("resume" in str(caught.value).replace("to resume from", "")) is (allowed == 1)
