"""Test that torch.compile does not change training, and that a missing compiler is reported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from gemma3_export.errors import UnavailableError
from gemma3_export.reference.training.metrics import read_metrics_log
from gemma3_export.reference.training.runs import train
from tests.support.token_folders import quick_options, random_tokens, write_config, write_tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens", random_tokens(600), random_tokens(200, seed=1))
    write_config(tmp_path / "config.json")
    return tmp_path


def run(folder: Path, name: str, **changes: object) -> list[float]:
    """Train; return the loss of each step and the final validation loss."""
    config = folder / "config.json"
    options = quick_options(steps=4, **changes)
    result = train(
        folder / "tokens", folder / name, options, config_path=config, report=lambda line: None
    )
    losses = [row.train_loss for row in read_metrics_log(folder / name)]
    return [*losses, result.state.best_validation_loss]


def test_failing_compiler_is_reported_before_the_run_folder_is_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(function):
        raise RuntimeError("No working C++ compiler found\nand forty lines more")

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(UnavailableError, match=r"does not work here \(No working C\+\+ compiler f"):
        run(folder, "run", compile=True)
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_training_has_the_same_losses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gradient_checkpointing: bool
) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    torch.compiler.reset()
    plain = run(folder, "plain", gradient_checkpointing=gradient_checkpointing)
    compiled = run(folder, "run", compile=True, gradient_checkpointing=gradient_checkpointing)
    assert compiled == pytest.approx(plain, rel=1e-5)
