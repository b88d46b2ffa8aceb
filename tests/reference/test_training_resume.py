"""Test that interrupted runs resume exactly, and that failures keep checkpoints."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.reference.training import trainer as trainer_module
from gemma3_export.reference.training.checkpoints import (
    checkpoint_steps,
    load_latest_checkpoint,
    save_checkpoint,
)
from gemma3_export.reference.training.metrics import LOG, MetricsLog, read_metrics_log
from gemma3_export.reference.training.runs import resume_training, train
from gemma3_export.reference.weights import open_weights
from tests.support.token_folders import quick_options, random_tokens, write_config, write_tokens

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create tokens, a config, and an uninterrupted run of 8 steps."""
    path = tmp_path_factory.mktemp("training")
    write_tokens(path / "tokens", random_tokens(600), random_tokens(200, seed=1))
    write_config(path / "config.json")
    train_quickly(path, path / "whole")
    return path


def train_quickly(folder: Path, run: Path, report=lambda line: None, **changes):
    return train(
        folder / "tokens",
        run,
        quick_options(**changes),
        config_path=folder / "config.json",
        report=report,
    )


def losses(run: Path) -> list[tuple[int, float, float | None, float]]:
    return [
        (row.step, row.train_loss, row.validation_loss, row.gradient_norm)
        for row in read_metrics_log(run)
    ]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException) -> None:
    update = trainer_module.Trainer.update

    def failing(self):
        if self.state.step == steps:
            raise error
        return update(self)

    monkeypatch.setattr(trainer_module.Trainer, "update", failing)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"precision": precision, "accumulation": 2}
    train_quickly(folder, whole, **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, RuntimeError("power cut"))
        with pytest.raises(RuntimeError, match="power cut"):
            train_quickly(folder, parts, **changes)
    assert [row.step for row in read_metrics_log(parts)] == [1, 2, 3, 4, 5]
    torch.rand(7)  # change the global random state in between
    random.random()

    resume_training(parts, report=lambda line: None)

    assert losses(parts) == losses(whole)
    one, other = (load_latest_checkpoint(run, pytest.fail) for run in (whole, parts))
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


LONGER = {"steps": STEPS, "eval_interval": 6, "checkpoint_interval": 3}  # long enough to be killed


TIMEOUT_S = 300  # a safety net; nothing depends on how long a process takes
NEVER_ENDING = f"""
import time
from gemma3_export.reference.training.trainer import Trainer
update = Trainer.update
def update_all_but_the_last(self):
    while self.state.step == {STEPS - 1}:
        time.sleep(0.01)
    return update(self)
Trainer.update = update_all_but_the_last
from gemma3_export.cli import main
main()
"""


def start_process(
    folder: Path, run: Path, *more: str, code: str | None = None, **changes: object
) -> subprocess.Popen[str]:
    """Start the command, or ``code`` instead of it, with ``quick_options(**LONGER)``."""
    program = ["-m", "gemma3_export"] if code is None else ["-c", code]
    command = [sys.executable, *program, "train", *more]
    if not more:
        command += [str(folder / "tokens"), "--config", str(folder / "config.json")]
        command += ["-o", str(run)]
        for name, value in quick_options(**LONGER | changes).to_json().items():
            if not isinstance(value, bool):
                command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_line(run: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        log = run / LOG
        if log.is_file() and log.read_text().count("\n") > step:
            return
        time.sleep(0.002)
    pytest.fail(f"the run never reached step {step}")


def test_kill_9_at_a_random_step_does_not_change_the_losses(folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_quickly(folder, whole, **LONGER)
    process = start_process(folder, killed, code=NEVER_ENDING)  # else it might end before the kill
    wait_for_line(killed, random.Random(time.time_ns()).randint(4, STEPS - 2))
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    process = start_process(folder, killed, "--resume", str(killed))
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert losses(killed) == losses(whole)


def test_sigterm_saves_a_checkpoint_and_exits(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_process(folder, run, steps=10**6)  # it cannot end before the signal
    wait_for_line(run, 4)
    process.terminate()
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by a signal" in output
    assert "Traceback" not in output
    step = checkpoint_steps(run)[-1]
    assert step == read_metrics_log(run)[-1].step, "nothing that was trained is lost"
    with open_weights(str(run)) as source:
        assert source.config.vocab_size == 20


@pytest.mark.parametrize("damage", ["truncate", "flip", "no record"])
def test_damaged_checkpoint_is_reported_and_the_previous_one_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, RuntimeError("power cut"))
        with pytest.raises(RuntimeError):
            train_quickly(folder, run)
    assert checkpoint_steps(run) == [4, 6]
    newest = run / "checkpoints" / "step-00000006.pt"
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    else:
        newest.with_suffix(".json").unlink()
    lines: list[str] = []

    resume_training(run, report=lines.append)

    said = {"truncate": "is truncated", "flip": "is damaged", "no record": "is incomplete"}
    assert f"step-00000006.pt {said[damage]}" in lines[0]
    assert "falling back" in lines[0]
    assert "resuming after step 4" in lines[1]
    assert losses(run) == losses(folder / "whole")


def test_no_intact_checkpoint_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        load_latest_checkpoint(tmp_path, lambda line: None)
    path = save_checkpoint(tmp_path, 3, {"a": 1}, keep=2)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no intact checkpoint"):
        load_latest_checkpoint(tmp_path, lambda line: None)


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Gemma3ExportError, match=r"(loss|gradient norm) is (nan|inf) at step \d+"):
        train_quickly(folder, run, learning_rate=1e30, min_learning_rate=0.0, checkpoint_interval=1)
    state = load_latest_checkpoint(run, pytest.fail)
    assert state["progress"]["step"] == read_metrics_log(run)[-1].step


def test_nan_weights_are_not_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    update = trainer_module.Trainer.update

    def poisoned(self):
        if self.state.step == 5:
            with torch.no_grad():
                next(self.module.parameters()).fill_(float("nan"))
        return update(self)

    monkeypatch.setattr(trainer_module.Trainer, "update", poisoned)
    with pytest.raises(Gemma3ExportError, match="loss is nan at step 6"):
        train_quickly(folder, run)
    state = load_latest_checkpoint(run, pytest.fail)
    assert state["progress"]["step"] == 4
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_full_disk_keeps_older_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"weights": torch.zeros(10)}, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(Gemma3ExportError, match="cannot write the checkpoint of step 2"):
            save_checkpoint(tmp_path, 2, {"weights": torch.zeros(100_000)}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_steps(tmp_path) == [1]
    assert load_latest_checkpoint(tmp_path, pytest.fail)["weights"].shape == (10,)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001.json",
        "step-00000001.pt",
    ]


def test_full_disk_while_logging_is_reported_and_checkpoints_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, row):
        if row.step == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, row)

    add = MetricsLog.add
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", full)
        with pytest.raises(Gemma3ExportError, match=r"No space left.*disk space and resume"):
            train_quickly(folder, tmp_path / "run")
    resume_training(tmp_path / "run", report=lambda line: None)
    assert losses(tmp_path / "run") == losses(folder / "whole")


def test_checkpoints_rotate(tmp_path: Path) -> None:
    for step in (1, 5, 12):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert checkpoint_steps(tmp_path) == [5, 12]
    assert load_latest_checkpoint(tmp_path, pytest.fail) == {"step": 12}


def test_resuming_with_other_data_is_an_error(folder: Path, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", random_tokens(500), random_tokens(200, seed=1))
    with pytest.raises(InputError, match="is not the data that this run was trained on"):
        resume_training(folder / "whole", data_path=other)
    foreign = write_tokens(
        tmp_path / "foreign", random_tokens(600), random_tokens(200, seed=1), fingerprint="x"
    )
    with pytest.raises(InputError, match="another tokenizer than this run's data"):
        resume_training(folder / "whole", data_path=foreign)


def test_existing_run_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(InputError, match="pass --force"):
        train_quickly(folder, folder / "whole")


def test_evaluation_interval_does_not_affect_training(folder: Path, tmp_path: Path) -> None:
    train_quickly(folder, tmp_path / "run", eval_interval=1)
    often = [(row.step, row.train_loss) for row in read_metrics_log(tmp_path / "run")]
    assert often == [(row.step, row.train_loss) for row in read_metrics_log(folder / "whole")]


def test_tensorboard_has_each_logged_value_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, RuntimeError("power cut"))
        with pytest.raises(RuntimeError):
            train_quickly(folder, run, tensorboard=True)
    resume_training(run, report=lambda line: None)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for name in ("train_loss", "validation_loss", "learning_rate", "gradient_norm"):
        found = {event.step: event.value for event in board.Scalars(name)}
        assert len(found) == len(board.Scalars(name)), "step 5 was trained twice and is shown once"
        logged = {row.step: getattr(row, name) for row in read_metrics_log(run)}
        wanted = {step: value for step, value in logged.items() if value is not None}
        assert found == pytest.approx(wanted, rel=1e-6)
