"""Define the command ``gemma3-export train``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from gemma3_export.cli.options import PATH, REAL, WHOLE, force_option
from gemma3_export.errors import UnavailableError
from gemma3_export.reference.training.options import PRECISIONS, SHARDINGS, TrainOptions

__all__ = ["train"]

# Small models tolerate a high learning rate; pretrained weights need a low one to keep what they
# have learned.
DEMO_RATE, FINE_TUNING_RATE = 6e-3, 2e-5
EPILOG = """\b
Examples:
  gemma3-export data -o tokens && gemma3-export train tokens --size demo -o run
  gemma3-export train tokens --weights google/gemma-3-270m -o tuned
  gemma3-export train --resume run
  gemma3-export train --resume run --steps 4000
  torchrun --nproc-per-node 4 -m gemma3_export train tokens --size 1b --sharding fsdp -o run
  gemma3-export onnx --weights run -o bundle
"""
OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("--steps", WHOLE, "Optimizer steps."),
    ("--batch-size", WHOLE, "Sequences per micro-batch and process."),
    ("--context-length", WHOLE, "Tokens per sequence."),
    ("--accumulation", WHOLE, "Micro-batches per optimizer step."),
    (
        "--learning-rate",
        REAL,
        "Peak learning rate.  [default: 1e-3; 6e-3 for size demo; 2e-5 with --weights]",
    ),
    (
        "--min-learning-rate",
        REAL,
        "Final value of the cosine schedule.  [default: a tenth of the peak]",
    ),
    ("--warmup-steps", WHOLE, "Linear warm-up steps."),
    ("--beta1", REAL, "AdamW beta1."),
    ("--beta2", REAL, "AdamW beta2."),
    ("--epsilon", REAL, "AdamW epsilon."),
    ("--weight-decay", REAL, "Weight decay of matrices; norms are not decayed."),
    ("--clip-norm", REAL, "Maximum gradient norm; 0 disables clipping."),
    ("--precision", click.Choice(PRECISIONS), "Dtype of the computation; weights stay in float32."),
    ("--gradient-checkpointing", bool, "Recompute layers in the backward pass to save memory."),
    ("--compile", bool, "Use torch.compile."),
    ("--loss-chunk-tokens", WHOLE, "Tokens whose logits are held in memory at once."),
    ("--eval-interval", WHOLE, "Steps between evaluations."),
    ("--eval-batches", WHOLE, "Batches per evaluation."),
    ("--sample-interval", WHOLE, "Steps between text samples; 0 disables them."),
    ("--sample-prompt", str, "Prompt of the text samples."),
    ("--sample-tokens", WHOLE, "Tokens per text sample."),
    ("--checkpoint-interval", WHOLE, "Steps between checkpoints."),
    ("--keep-checkpoints", WHOLE, "Number of checkpoints to keep."),
    ("--log-interval", WHOLE, "Steps between log entries."),
    ("--seed", WHOLE, "Seed of weights and data order."),
    ("--device", str, "auto, cpu, cuda or cuda:N."),
    (
        "--sharding",
        click.Choice(SHARDINGS),
        "With torchrun: replicate the model (ddp) or shard it (fsdp).",
    ),
    ("--tensorboard", bool, "Also write TensorBoard event files."),
)


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option per field of ``TrainOptions``, which also defines the defaults."""
    defaults = TrainOptions().to_json()
    for name, kind, text in reversed(OPTIONS):
        if kind is bool:
            command = click.option(name, is_flag=True, default=None, help=text)(command)
            continue
        default = defaults[name.removeprefix("--").replace("-", "_")]
        if default != "" and "[default" not in text:
            text = f"{text.removesuffix('.')}.  [default: {default}]"
        command = click.option(name, type=kind, default=None, help=text)(command)
    return command


@click.command(epilog=EPILOG)
@click.argument("data_path", metavar="[DATA]", required=False, type=PATH)
@click.option("-o", "--output", "run", type=PATH, help="Run folder to create.")
@click.option(
    "--resume",
    type=PATH,
    metavar="RUN",
    help="Continue a run; --steps sets a new total of steps.",
)
@click.option(
    "--size", metavar="S", help="Train from scratch: demo, or a published size such as 270m."
)
@click.option(
    "--config",
    "config_path",
    type=PATH,
    help="Train from scratch with this config.json.",
)
@click.option("--weights", metavar="SRC", help="Fine-tune these weights, in any supported format.")
@force_option
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
    """Train or fine-tune a model on tokenized text.

    DATA is a folder made by `gemma3-export data`. The run folder always holds the best weights so
    far in Hugging Face format, and every other command accepts it as --weights. On SIGTERM or
    Ctrl-C, training saves a checkpoint and exits; --resume continues it with identical results, and
    with --steps also beyond its last step.
    """
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError(
            'training needs torch, which is not installed; run: pip install "gemma3-export[train]"'
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        steps = chosen.pop("steps", None)
        if chosen or run or size or config_path or weights or force:
            raise click.UsageError("--resume takes its options from the run; omit all but --steps")
        _resume(resume, data_path, steps)
        return
    if data_path is None or run is None:
        raise click.UsageError("give DATA and --output, or --resume RUN")
    if weights is None and size is None and config_path is None:
        raise click.UsageError(
            "no model; give --weights SRC to fine-tune it, or --size or --config to train from "
            "scratch (--size demo is the smallest)"
        )

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


def _resume(run: Path, data_path: Path | None, steps: int | None) -> None:
    from gemma3_export.reference.training.runs import resume_training

    _print_end(resume_training(run, data_path=data_path, steps=steps, report=click.echo))


def _print_end(result: Any) -> None:
    from gemma3_export.reference.training.distributed import exit_if_distributed

    progress = result.state
    if progress.best_step:
        click.echo(
            f"best validation loss {progress.best_validation_loss:.4f}, after step "
            f"{progress.best_step}"
        )
    if not result.has_loss_curve:
        click.echo(
            "no loss.png: matplotlib is not installed; run: pip install 'gemma3-export[train]'",
            err=True,
        )
    click.echo(f"next: gemma3-export onnx --weights {result.run} -o bundle")
    exit_if_distributed()
