"""Start or resume a training run: the functions behind ``gemma3-export train``.

A run is a folder. It is also a valid Hugging Face folder with the best weights so far at any time,
so ``gemma3-export onnx --weights RUN`` exports it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gemma3_export import __version__
from gemma3_export.bundle import write_hf_metadata
from gemma3_export.config import CONFIG_NAME, Gemma3Config, config_to_json, load_config
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import is_file, to_path
from gemma3_export.records import Count, read_record
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.training.checkpoints import after_failure, load_latest_checkpoint
from gemma3_export.reference.training.distributed import ProcessGroup, init_process_group
from gemma3_export.reference.training.initialization import (
    config_for_data,
    model_from_config,
    model_from_pretrained,
)
from gemma3_export.reference.training.metrics import (
    MetricsLog,
    draw_loss_curve,
    require_tensorboard,
)
from gemma3_export.reference.training.optimizer import learning_rate
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.token_data import TokenData, TokenMeta, open_token_data
from gemma3_export.reference.training.trainer import Trainer, TrainState
from gemma3_export.reference.weights import WeightSource
from gemma3_export.signals import uninterrupted
from gemma3_export.staging import (
    foreign_files,
    reject_existing,
    sole_writer,
    write_text_atomically,
)

__all__ = ["RECORD", "RunRecord", "TrainResult", "read_run_record", "resume_training", "train"]

RECORD = "training.json"
REMEDY = "start a new run"
FORMAT_VERSION = 1
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The content of ``training.json``."""

    format_version: int
    options: dict[str, Any]  # see :meth:`TrainOptions.from_json`
    parameters: Count
    world_size: Count
    data: TokenMeta
    weights: dict[str, Any] | None  # fingerprint of the weights that were fine-tuned
    versions: dict[str, str]
    data_path: str | None = None  # absolute; None in the record of the bundled model
    result: dict[str, Any] | None = None  # of a run that has ended
    extensions: list[dict[str, Count]] | None = None  # changes of the number of steps
    config: dict[str, Any] | None = None  # as config.json; older records have none


def read_run_record(run: Path) -> RunRecord:
    """Read the record of the run in the folder ``run``.

    Raises:
        InputError: it is not a run, or its record is damaged or of another version.
    """
    if not is_file(run / RECORD):
        raise InputError(
            f"{run} is not a run (no {RECORD}); give the folder that `gemma3-export train` made"
        )
    return read_record(run / RECORD, RunRecord, remedy=REMEDY, format_versions=(FORMAT_VERSION,))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """The final state of a run."""

    run: Path
    state: TrainState
    has_loss_curve: bool


def train(
    data_path: Path | str,
    run: Path | str,
    options: TrainOptions,
    *,
    source: WeightSource | None = None,
    size: str | None = None,
    config_path: Path | str | None = None,
    force: bool = False,
    report: Report = print,
) -> TrainResult:
    """Train a model from scratch, or fine-tune the weights of ``source``.

    Args:
        data_path: a token folder written by ``gemma3-export data``.
        run: the folder to create.
        options: hyperparameters and intervals.
        source: pretrained weights, in any format that ``open_weights`` accepts.
        size: ``demo`` or a published size, to train from scratch.
        config_path: a ``config.json``, to train from scratch.
        force: replace an existing folder.
        report: receives log messages, one line per call.

    Raises:
        InputError: the folder exists, or data, config and weights contradict each other.
        UnavailableError: a device or package is missing.
        Gemma3ExportError: the loss or a gradient is not finite, or the disk is full.
    """
    run = to_path(run, "the run")
    data = open_token_data(data_path)
    config = None if config_path is None else to_path(config_path, "config_path")
    with init_process_group(options.device) as group, _sole_writer(run, group):
        _check(options, group)
        if source is not None:
            if size is not None or config_path is not None:
                raise InputError("--weights determines the config; drop --size and --config")
            model = model_from_pretrained(source, data)
        else:
            model = model_from_config(config_for_data(data, size, config), options.seed)
        _check_sample_prompt(options, data, model.config)
        if group.is_main_process:
            _settle(run, report)  # what a killed run left
            reject_existing(run, force=force)
        trainer = Trainer(options, data, model, run, group, report)
        with _report_write_errors(run), _old_run_aside(run, group, report, force=force):
            if group.is_main_process:
                _write_folder(run, trainer, source)
            return _run(trainer)


def resume_training(
    run: Path | str,
    *,
    data_path: Path | str | None = None,
    steps: int | None = None,
    report: Report = print,
) -> TrainResult:
    """Resume ``run`` from its newest intact checkpoint; the result is that of an uninterrupted run.

    With another number of steps, the learning rate continues on the schedule of that length, and
    the record says so. From a run that had decayed to its end, it therefore rises first.

    Args:
        run: the folder of an interrupted run, or of one to continue.
        data_path: the run's token folder, if it has moved.
        steps: new number of steps in total; None keeps the run's own.
        report: receives log messages, one line per call.

    Raises:
        InputError: there is no intact checkpoint, the run was trained on other data, or has
            already made ``steps``.
    """
    run = to_path(run, "the run")
    record = read_run_record(run)
    options = TrainOptions.from_json(record.options)
    if data_path is None and record.data_path is None:
        raise InputError(f"{run / RECORD} does not say where its data is; give DATA")
    data = open_token_data(data_path or record.data_path or "")
    _check_same_data(data.meta, record.data, data.path)
    with init_process_group(options.device) as group, _sole_writer(run, group):
        if group.is_main_process and _has_results(run):
            _settle(run, report)  # what a killed replacement left
        # Every process reads the checkpoint; only the main process reports problems with it.
        state = load_latest_checkpoint(run, report if group.is_main_process else lambda line: None)
        changed = options if steps is None else replace(options, steps=steps)
        config = load_config(run)
        _check_same_config(config, record, run)
        trainer = Trainer(changed, data, Gemma3(config), run, group, report)
        trainer.restore(state)
        done = trainer.state.step
        if steps is not None and steps <= done:
            raise InputError(
                f"{run} has already made {done} steps; give --steps more than that to go on"
            )
        trainer.report(f"resuming after step {done}")
        if changed != options:
            rates = [learning_rate(done, chosen) for chosen in (options, changed)]
            trainer.report(
                f"going on to step {steps} instead of {options.steps}: the learning rate is "
                f"{rates[1]:.2e} now (was {rates[0]:.2e}), on the schedule of {steps} steps"
            )
        elif done >= options.steps:
            trainer.report(
                f"all {done} steps are done; to go on: gemma3-export train --resume {run} "
                "--steps MORE"
            )
        with _report_write_errors(run):
            if changed != options and group.is_main_process:
                extension = {"after_step": done, "from": options.steps, "to": changed.steps}
                extensions = [*(record.extensions or []), extension]
                _write_record(
                    run, replace(record, options=changed.to_json(), extensions=extensions)
                )
            return _run(trainer)


@contextmanager
def _report_write_errors(run: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the small files (log, curve, record) into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise Gemma3ExportError(f"cannot write to {run}: {error}; {after_failure(run)}") from error


def _run(trainer: Trainer) -> TrainResult:
    run, group, state = trainer.run_folder, trainer.group, trainer.state
    metrics_log = None
    if group.is_main_process:
        tensorboard = trainer.options.tensorboard
        metrics_log = MetricsLog(run, start_step=state.step, tensorboard=tensorboard)
    has_curve = False
    trainer.describe_data()
    try:
        trainer.run(metrics_log)
    finally:
        if metrics_log is not None:
            metrics_log.close()
            has_curve = draw_loss_curve(run)
    if group.is_main_process:
        _write_record(run, replace(read_run_record(run), result=_result(trainer)))
    group.barrier()
    return TrainResult(run=run, state=trainer.state, has_loss_curve=has_curve)


@contextmanager
def _sole_writer(run: Path, group: ProcessGroup) -> Iterator[None]:
    """Let one training at a time write to ``run``.

    Raises:
        InputError: another process does.
    """
    if not group.is_main_process:
        yield
        return
    with sole_writer(run, f"training into {run}"):
        yield


@contextmanager
def _old_run_aside(
    run: Path, group: ProcessGroup, report: Report, *, force: bool
) -> Iterator[None]:
    """Set an old run aside, and delete it once the new one has weights or a checkpoint.

    If the new run ends before that, the old one comes back.
    """
    if not group.is_main_process:
        yield
        return
    reject_existing(run, force=force)  # again: files may have appeared meanwhile
    try:
        with uninterrupted():
            if run.exists() and not os.path.ismount(run):  # a mount point is empty, or was rejected
                run.rename(_aside(run))
        yield
    finally:
        with uninterrupted():
            if not _has_results(run) and run.exists():
                _discard(run)
            _settle(run, report)


def _aside(run: Path) -> Path:
    return run.absolute().with_name(f".{run.name}.replaced")


def _settle(run: Path, report: Report) -> None:
    """Delete the run that was set aside, or bring it back if the new one has nothing to show."""
    aside = _aside(run)
    if not aside.exists():
        return
    if _has_results(run):
        shutil.rmtree(aside)
    elif not run.exists() or _discard(run):
        aside.rename(run)
        report(f"{run}: the run that was to be replaced is back")
    else:
        report(f"{run} contains files of yours; the run that it was to replace is {aside}")


def _has_results(run: Path) -> bool:
    return any(run.glob("*.safetensors")) or any((run / "checkpoints").glob("step-*.pt"))


def _discard(run: Path) -> bool:
    """Delete a run without results, unless it contains files that this program did not write."""
    if any(run.iterdir()) and foreign_files(run):
        return False
    if not os.path.ismount(run):
        shutil.rmtree(run)
        return True
    for path in run.iterdir():  # of a mount point, only the content can go
        if path.is_file():
            path.unlink()
        elif not path.name.startswith("."):  # the lock's folder goes when the lock does
            shutil.rmtree(path)
    return True


def _check_sample_prompt(options: TrainOptions, data: TokenData, config: Gemma3Config) -> None:
    """Reject a sample prompt that would end the run at its first sample.

    Raises:
        InputError: it does not fit the model's context.
    """
    tokenizer = data.tokenizer()
    if not options.sample_interval or tokenizer is None:
        return
    length = len(tokenizer.encode(options.sample_prompt))
    if length > config.max_position_embeddings:
        raise InputError(
            f"--sample-prompt has {length} tokens, and the model's context is "
            f"{config.max_position_embeddings}; shorten it"
        )


def _check(options: TrainOptions, group: ProcessGroup) -> None:
    if options.tensorboard:
        require_tensorboard()
    if options.precision == "fp16" and options.sharding == "fsdp" and group.is_distributed:
        raise InputError("fp16 is not supported with --sharding fsdp; use bf16")


def _check_same_data(found: TokenMeta, recorded: TokenMeta, where: Path) -> None:
    if found.tokenizer_fingerprint != recorded.tokenizer_fingerprint:
        raise InputError(
            f"{where} was tokenized with another tokenizer than this run's data; resume with the "
            "original data"
        )
    if found != recorded:
        raise InputError(
            f"{where} is not the data that this run was trained on; resume with the original data"
        )


def _check_same_config(config: Gemma3Config, record: RunRecord, run: Path) -> None:
    if record.config is None:
        return
    found = config_to_json(config)
    changed = sorted(key for key in found if found[key] != record.config.get(key))
    if changed:
        raise InputError(
            f"{run / CONFIG_NAME} was changed since the run began: {changed[0]} is "
            f"{found[changed[0]]!r} instead of {record.config.get(changed[0])!r}; restore it"
        )


def _write_folder(run: Path, trainer: Trainer, source: WeightSource | None) -> None:
    data, model = trainer.data, trainer.module.model
    run.mkdir(parents=True, exist_ok=True)  # it may be an empty mount point
    generation = None if source is None else source.generation_config()
    write_hf_metadata(run, model.config, data.tokenizer(), generation)
    record = RunRecord(
        format_version=FORMAT_VERSION,
        options=trainer.options.to_json(),
        parameters=model.config.num_parameters,
        world_size=trainer.group.world_size,
        data_path=str(data.path.absolute()),
        data=data.meta,
        weights=None if source is None else source.fingerprint(),
        config=config_to_json(model.config),
        versions={
            "gemma3-export": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": importlib.metadata.version("tokenizers"),
        },
    )
    _write_record(run, record)


def _write_record(run: Path, record: RunRecord) -> None:
    data = asdict(record) | {"data": record.data.to_json()}
    write_text_atomically(run / RECORD, json.dumps(data, indent=2) + "\n")


def _result(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    tokens = state.tokens
    return {
        "steps": state.step,
        "tokens": tokens,
        "training_seconds": round(state.seconds, 1),
        "tokens_per_second": round(tokens / max(state.seconds, 1e-9)),
        "validation_loss": state.validation_loss,
        "best_validation_loss": state.best_validation_loss if state.best_step else None,
        "best_step": state.best_step,
    }
