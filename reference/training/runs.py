"""Start a run, or go on with one: the calls behind ``gemma3-export train``.

A run is a folder. At any time it is also a Hugging Face folder of the best weights so far, so
``gemma3-export onnx --weights RUN`` exports it as it is.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma3_export import __version__
from gemma3_export.config import load_config, load_json_object
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.training.checkpoints import load_latest_checkpoint
from gemma3_export.reference.training.distributed import Ranks, join_ranks
from gemma3_export.reference.training.initialization import (
    fresh_config,
    fresh_model,
    model_from_weights,
)
from gemma3_export.reference.training.metrics_log import Logbook, draw_loss_curve
from gemma3_export.reference.training.model_folder import write_description
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.token_data import TokenMeta, open_token_data
from gemma3_export.reference.training.trainer import Progress, Trainer
from gemma3_export.reference.weights import WeightSource
from gemma3_export.staging import refuse_existing, write_text_atomically

__all__ = ["RECORD", "TrainResult", "resume_training", "train"]

RECORD = "training.json"
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    run: Path
    progress: Progress
    has_loss_curve: bool


def train(
    data_path: Path,
    run: Path,
    options: TrainOptions,
    *,
    source: WeightSource | None = None,
    size: str | None = None,
    config_path: Path | None = None,
    force: bool = False,
    report: Report = print,
) -> TrainResult:
    """Train from scratch, or from ``source``.

    Args:
        data_path: a folder of tokens, from ``gemma3-export data``.
        run: the folder to create.
        options: how to train.
        source: weights to go on from, of any kind that ``open_weights`` takes.
        size: ``demo`` or a published size, for fresh weights.
        config_path: a ``config.json``, for fresh weights.
        force: replace an existing folder.
        report: told what people should see, one line at a time.

    Raises:
        InputError: folder, data, config and weights contradict each other.
        UnavailableError: a device or package is missing.
        Gemma3ExportError: the loss is no number any more, or the disk is full.
    """
    data = open_token_data(data_path)
    with join_ranks(options.device) as ranks:
        _check(options, ranks)
        if source is not None:
            if size is not None or config_path is not None:
                raise InputError("weights bring their own shapes; drop --size and --config")
            model = model_from_weights(source, data)
        else:
            model = fresh_model(fresh_config(data, size, config_path), options.seed)
        if ranks.is_first:
            refuse_existing(run, force=force)
        trainer = Trainer(options, data, model, run, ranks, report)
        with _full_disk_is_named(run):
            if ranks.is_first:
                shutil.rmtree(run, ignore_errors=True)
                _write_folder(run, trainer, source)
            return _run(trainer)


def resume_training(
    run: Path, *, data_path: Path | None = None, report: Report = print
) -> TrainResult:
    """Go on from the newest whole checkpoint of ``run``, as if nothing had happened.

    Args:
        run: the folder of an interrupted run.
        data_path: where its data lies now, if it was moved.
        report: told what people should see, one line at a time.

    Raises:
        InputError: there is no whole checkpoint, or the data is not the run's.
    """
    record = load_json_object(run / RECORD)
    options = TrainOptions.from_json(record["options"])
    data = open_token_data(data_path or Path(record["data_path"]))
    _check_same_data(data.meta, record["data"], data.path)
    with join_ranks(options.device) as ranks:
        # Every process reads the file; only one speaks about it.
        state = load_latest_checkpoint(run, report if ranks.is_first else lambda line: None)
        trainer = Trainer(options, data, Gemma3(load_config(run)), run, ranks, report)
        trainer.restore(state)
        trainer.report(f"resuming after step {trainer.progress.step}")
        with _full_disk_is_named(run):
            return _run(trainer)


@contextmanager
def _full_disk_is_named(run: Path) -> Iterator[None]:
    """Log, curve and record are small, but a disk may be full to the last byte."""
    try:
        yield
    except OSError as error:
        raise Gemma3ExportError(
            f"cannot write to {run}: {error}; what checkpoints it has are kept, free some space "
            "and resume"
        ) from error


def _run(trainer: Trainer) -> TrainResult:
    run, ranks, progress = trainer.run_folder, trainer.ranks, trainer.progress
    logbook = None
    if ranks.is_first:
        tensorboard = trainer.options.tensorboard
        logbook = Logbook(run, start_step=progress.step, tensorboard=tensorboard)
    has_curve = False
    try:
        trainer.run(logbook)
    finally:
        if logbook is not None:
            logbook.close()
            has_curve = draw_loss_curve(run)
    if ranks.is_first:
        record = load_json_object(run / RECORD) | {"result": _result(trainer)}
        write_text_atomically(run / RECORD, json.dumps(record, indent=2) + "\n")
    ranks.wait()
    return TrainResult(run=run, progress=trainer.progress, has_loss_curve=has_curve)


def _check(options: TrainOptions, ranks: Ranks) -> None:
    if options.precision == "fp16" and options.sharding == "fsdp" and not ranks.is_alone:
        raise InputError("fp16 is not supported with --sharding fsdp; use bf16")


def _check_same_data(found: TokenMeta, recorded: dict[str, Any], where: Path) -> None:
    if found.tokenizer_fingerprint != recorded["tokenizer_fingerprint"]:
        raise InputError(
            f"{where} was made with another tokenizer than this run's; resume with the data that "
            "it began with"
        )
    if found.to_json() != recorded:
        raise InputError(f"{where} is not the data that this run began with; give that one")


def _write_folder(run: Path, trainer: Trainer, source: WeightSource | None) -> None:
    data, model = trainer.data, trainer.module.model
    run.mkdir(parents=True)
    write_description(run, model.config, data.tokenizer())
    record = {
        "format_version": 1,
        "options": trainer.options.to_json(),
        "parameters": model.config.num_parameters,
        "world_size": trainer.ranks.world_size,
        "data_path": str(data.path.absolute()),
        "data": data.meta.to_json(),
        "weights": None if source is None else source.fingerprint(),
        "versions": {
            "gemma3-export": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": importlib.metadata.version("tokenizers"),
        },
    }
    write_text_atomically(run / RECORD, json.dumps(record, indent=2) + "\n")


def _result(trainer: Trainer) -> dict[str, Any]:
    progress, options = trainer.progress, trainer.options
    per_step = options.batch_size * options.context_length * options.accumulation
    tokens = progress.step * per_step * trainer.ranks.world_size
    return {
        "steps": progress.step,
        "tokens": tokens,
        "training_seconds": round(progress.seconds, 1),
        "tokens_per_second": round(tokens / max(progress.seconds, 1e-9)),
        "validation_loss": progress.validation_loss,
        "best_validation_loss": progress.best_validation_loss if progress.best_step else None,
        "best_step": progress.best_step,
    }
