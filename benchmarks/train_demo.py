"""Retrain the bundled demo model from scratch, offline, and compare its loss with the recorded one.

    python -m benchmarks.train_demo -o build/train-demo

``make train-demo`` runs this. The text is Python's standard library, and the tokenizer a small BPE
trained on it. ``--install`` replaces the bundled model with the result.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import click
import torch

from gemma3_export.errors import Gemma3ExportError
from gemma3_export.progress import ProgressBars
from gemma3_export.reference.training.checkpoints import checkpoint_steps
from gemma3_export.reference.training.documents import PythonLibrary
from gemma3_export.reference.training.initialization import DEMO
from gemma3_export.reference.training.metrics import LOG
from gemma3_export.reference.training.model_folder import export_hf_folder
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.preparation import prepare_tokens, train_bpe
from gemma3_export.reference.training.runs import (
    RECORD,
    read_run_record,
    resume_training,
    train,
)
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.opening import DEMO_FOLDER

__all__ = ["DEMO_OPTIONS", "DEMO_VOCAB_SIZE", "install", "retrain_demo"]

DEMO_VOCAB_SIZE = 2048
DEMO_OPTIONS = TrainOptions(
    steps=2500,
    batch_size=4,
    context_length=256,
    learning_rate=6e-3,
    min_learning_rate=1e-4,
    warmup_steps=100,
    eval_interval=250,
    eval_batches=48,
    sample_interval=500,
    sample_prompt="def ",
    checkpoint_interval=250,
    seed=2026,
)
TOLERANCE = 0.02  # relative to the recorded validation loss
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", LOG)


def retrain_demo(folder: Path) -> float:
    """Prepare the data, train, and return the best validation loss.

    An interrupted run with the same options in ``folder`` is resumed; anything else is replaced.

    Raises:
        Gemma3ExportError: the loss is not finite, or the disk is full.
    """
    tokens, run = folder / "tokens", folder / "run"
    if _is_interrupted(run):
        result = resume_training(run, data_path=tokens, report=click.echo)
    else:
        source = PythonLibrary()
        with ProgressBars() as progress:
            bpe = train_bpe(source, DEMO_VOCAB_SIZE)
            prepare_tokens(source, bpe, tokens, force=True, progress=progress)
        result = train(tokens, run, DEMO_OPTIONS, size=DEMO, force=True, report=click.echo)
    return result.state.best_validation_loss


def _is_interrupted(run: Path) -> bool:
    """Return whether ``run`` is an unfinished run with the demo's options."""
    if not checkpoint_steps(run):
        return False
    record = read_run_record(run)
    steps = (record.result or {}).get("steps", 0)  # recorded when a run ends, even by a signal
    return bool(record.options == DEMO_OPTIONS.to_json() and steps < DEMO_OPTIONS.steps)


def install(run: Path) -> None:
    """Replace the bundled model with that of ``run``: bfloat16 weights, and the run's record."""
    record = asdict(read_run_record(run))
    del record["data_path"]  # a path on this machine
    with open_weights(str(run)) as source:
        export_hf_folder(source, DEMO_FOLDER, dtype=torch.bfloat16, force=True)
    for name in COPIED:
        shutil.copyfile(run / name, DEMO_FOLDER / name)
    (DEMO_FOLDER / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--install", "is_to_install", is_flag=True, help="Replace the bundled model.")
def main(output: Path, is_to_install: bool) -> None:
    """Retrain the demo model, and fail if its loss is more than 2 % above the recorded one."""
    try:
        loss = retrain_demo(output)
    except Gemma3ExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if is_to_install:
        install(output / "run")
        click.echo(f"installed: validation loss {loss:.4f}")
        return
    recorded = read_run_record(DEMO_FOLDER)
    expected = (recorded.result or {})["best_validation_loss"]
    click.echo(
        f"validation loss {loss:.4f}, recorded {expected:.4f} ({loss / expected - 1:+.2%}; "
        f"recorded with Python {recorded.versions['python']}, whose library is the text)"
    )
    if loss > expected * (1 + TOLERANCE):
        click.echo(f"error: the loss is more than {TOLERANCE:.0%} above the recorded one", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
