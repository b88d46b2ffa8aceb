"""Test that two processes train like one process with twice the batch size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from benchmarks.environments import free_port
from gemma3_export.reference.training.checkpoints import checkpoint_steps
from gemma3_export.reference.training.metrics import read_metrics_log
from gemma3_export.reference.training.runs import resume_training, train
from tests.support.token_folders import (
    quick_options,
    random_examples,
    random_tokens,
    write_config,
    write_examples,
    write_tokens,
)

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
STEPS = 6


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create tokens, a config, and a single-process run with 8 rows per micro-batch."""
    path = tmp_path_factory.mktemp("distributed")
    if request.param == "text":
        write_tokens(path / "tokens", random_tokens(800), random_tokens(300, seed=1))
    else:  # processes have different numbers of learned tokens
        splits = {"train": random_examples(90), "validation": random_examples(13, seed=1)}
        write_examples(path / "tokens", splits)
    write_config(path / "config.json")
    options = quick_options(steps=STEPS, batch_size=8, accumulation=2, eval_interval=3)
    train(
        path / "tokens",
        path / "alone",
        options,
        config_path=path / "config.json",
        report=lambda line: None,
    )
    return path


def run_on_two(arguments: list[str], log: Path) -> str:
    port = free_port()
    processes, files = [], []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # show where torch's threads are if one aborts
        }
        files.append(log.with_suffix(f".{rank}").open("w+"))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "gemma3_export", "train", *arguments],
                env=environment,
                stdout=files[-1],
                stderr=subprocess.STDOUT,
            )
        )
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
        file.close()
    assert codes == [0, 0], "\n".join(texts)
    return texts[0]


@pytest.mark.parametrize(
    ("folder", "sharding"),
    [
        ("examples", "ddp"),
        ("text", "fsdp"),
        pytest.param("examples", "fsdp", marks=pytest.mark.slow),
        pytest.param("text", "ddp", marks=pytest.mark.slow),
    ],
    indirect=["folder"],
)
def test_two_processes_equal_one_with_twice_the_batch_size(
    folder: Path, tmp_path: Path, sharding: str
) -> None:
    run = tmp_path / sharding
    options = quick_options(
        steps=STEPS, batch_size=4, accumulation=2, eval_interval=3, sharding=sharding
    )
    named = {
        f"--{name.replace('_', '-')}": value
        for name, value in options.to_json().items()
        if not isinstance(value, bool)
    }
    arguments = [str(folder / "tokens"), "--config", str(folder / "config.json"), "-o", str(run)]
    for name, value in named.items():
        arguments += [name, str(value)]
    output = run_on_two(arguments, tmp_path / "log")
    assert "Traceback" not in output

    found, expected = read_metrics_log(run), read_metrics_log(folder / "alone")
    assert [row.step for row in found] == [row.step for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
        if other.validation_loss is not None:
            assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-5)
    weights = load_file(run / "model.safetensors")
    for name, weight in load_file(folder / "alone" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)

    # A run of two processes can resume with two processes or one.
    for newest in (run / "checkpoints").glob(f"step-{STEPS:08d}.*"):
        newest.unlink()
    assert checkpoint_steps(run) == [STEPS - 2]
    run_on_two(["--resume", str(run)], tmp_path / "resumed")
    assert [row.train_loss for row in read_metrics_log(run)] == pytest.approx(
        [row.train_loss for row in found], rel=1e-6
    )
    for newest in (run / "checkpoints").glob(f"step-{STEPS:08d}.*"):
        newest.unlink()
    assert resume_training(run, report=lambda line: None).state.step == STEPS
