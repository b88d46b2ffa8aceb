"""``gemma3-export train``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from gemma3_export.errors import UnavailableError
from gemma3_export.reference.training.options import PRECISIONS, SHARDINGS

__all__ = ["train"]

# Repeated from the trainer, which needs torch to be imported; a test holds them equal.
# Small models take larger steps; trained ones must not be torn from where they are.
DEMO_RATE, FINE_TUNING_RATE = 6e-3, 2e-5
EPILOG = """\b
Examples:
  gemma3-export data -o tokens && gemma3-export train tokens --size demo -o run
  gemma3-export train tokens --weights google/gemma-3-270m -o tuned
  gemma3-export train --resume run
  torchrun --nproc-per-node 4 -m gemma3_export train tokens --size 1b --sharding fsdp -o run
  gemma3-export onnx --weights run -o bundle
"""
OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("--steps", int, "Updates of the weights."),
    ("--batch-size", int, "Windows in a micro-batch, for each process."),
    ("--context-length", int, "Tokens of a window."),
    ("--accumulation", int, "Micro-batches a step."),
    (
        "--learning-rate",
        float,
        "The highest, after the warm-up (default: 1e-3, demo size 6e-3, --weights 2e-5).",
    ),
    ("--min-learning-rate", float, "Where the cosine ends (default: a tenth of the highest)."),
    ("--warmup-steps", int, "Steps of linear warm-up."),
    ("--beta1", float, "Of AdamW."),
    ("--beta2", float, "Of AdamW."),
    ("--epsilon", float, "Of AdamW."),
    ("--weight-decay", float, "Of matrices; norms have none."),
    ("--clip-norm", float, "Highest gradient norm; 0 is off."),
    ("--precision", click.Choice(PRECISIONS), "Of the computation; weights stay float32."),
    ("--gradient-checkpointing", bool, "Compute layers twice to save memory."),
    ("--compile", bool, "Use torch.compile."),
    ("--loss-chunk-tokens", int, "Tokens whose logits exist at a time."),
    ("--eval-interval", int, "Steps between evaluations."),
    ("--eval-batches", int, "Batches of an evaluation."),
    ("--sample-interval", int, "Steps between samples of text; 0 is off."),
    ("--sample-prompt", str, "What samples begin with."),
    ("--sample-tokens", int, "Tokens of a sample."),
    ("--checkpoint-interval", int, "Steps between checkpoints."),
    ("--keep-checkpoints", int, "How many to keep."),
    ("--log-interval", int, "Steps between lines of the log."),
    ("--seed", int, "Of weights and data."),
    ("--device", str, "auto, cpu, cuda or cuda:N."),
    ("--sharding", click.Choice(SHARDINGS), "Under torchrun: copies, or shards of the model."),
    ("--tensorboard", bool, "Write TensorBoard files too."),
)


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of ``TrainOptions``, whose defaults count."""
    for name, kind, text in reversed(OPTIONS):
        if kind is bool:
            command = click.option(name, is_flag=True, default=None, help=text)(command)
        else:
            command = click.option(name, type=kind, default=None, help=text)(command)
    return command


@click.command(epilog=EPILOG)
@click.argument("data_path", metavar="[DATA]", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "run", type=click.Path(path_type=Path), help="The run's folder to create."
)
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run.")
@click.option("--size", metavar="S", help="demo, or a published size such as 270m: fresh weights.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="A config.json: fresh weights.",
)
@click.option("--weights", metavar="SRC", help="Go on from these weights, whatever their format.")
@click.option("--force", is_flag=True, help="Replace an existing folder that this program made.")
@train_options
def train(
    data_path: Path | None,
    run: Path | None,
    resume: Path | None,
    size: str | None,
    config_path: Path | None,
    weights: str | None,
    force: bool,
    **given: Any,
) -> None:
    """Train a model on DATA, a folder that `gemma3-export data` made.

    The run's folder is always a Hugging Face folder of the best weights so far, which every other
    command takes as --weights. SIGTERM and Ctrl-C save and end; --resume goes on as if nothing had
    happened.
    """
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError('training needs torch; run: pip install "gemma3-export[train]"')
    chosen = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        if chosen or run or size or config_path or weights or force:
            raise click.UsageError("--resume takes its options from the run; give no others")
        _resume(resume, data_path)
        return
    if data_path is None or run is None:
        raise click.UsageError("give DATA and --output, or --resume RUN")
    if weights is None and size is None and config_path is None:
        size = "demo"

    from gemma3_export.reference.training.options import TrainOptions
    from gemma3_export.reference.training.runs import train as start_training
    from gemma3_export.reference.weights import open_weights

    assert {field.name for field in fields(TrainOptions)} == set(given)
    if weights is not None:
        chosen.setdefault("learning_rate", FINE_TUNING_RATE)
    elif size == "demo":
        chosen.setdefault("learning_rate", DEMO_RATE)
    if "learning_rate" in chosen:
        chosen.setdefault("min_learning_rate", chosen["learning_rate"] / 10)
    options = TrainOptions(**chosen)
    source = None if weights is None else open_weights(weights)
    result = start_training(
        data_path,
        run,
        options,
        source=source,
        size=size,
        config_path=config_path,
        force=force,
        report=click.echo,
    )
    _print_end(result)


def _resume(run: Path, data_path: Path | None) -> None:
    from gemma3_export.reference.training.runs import resume_training

    _print_end(resume_training(run, data_path=data_path, report=click.echo))


def _print_end(result: Any) -> None:
    progress = result.progress
    if progress.best_step:
        click.echo(
            f"best validation loss {progress.best_validation_loss:.4f}, after step "
            f"{progress.best_step}"
        )
    if not result.has_loss_curve:
        click.echo("no loss.png: matplotlib is not installed (the extra train has it)", err=True)
    click.echo(f"next: gemma3-export onnx --weights {result.run} -o bundle")
