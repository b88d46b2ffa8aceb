"""Save and load checkpoints atomically, with checksums and rotation.

A checkpoint is a file of tensors plus a small JSON record with its size and SHA-256, written last.
A checkpoint without a matching record is ignored, so after a kill, a full disk or a truncated copy
the run resumes from the one before it.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma3_export.bundle import sha256_of
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import check_regular, is_file
from gemma3_export.records import Count, read_record
from gemma3_export.staging import write_text_atomically

__all__ = [
    "after_failure",
    "checkpoint_steps",
    "get_rng_states",
    "load_latest_checkpoint",
    "save_checkpoint",
    "set_rng_states",
]

FOLDER = "checkpoints"
CHECKPOINT = re.compile(r"step-(\d{8}|[1-9]\d{8,17})\.pt")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """Describes a checkpoint."""

    step: Count
    size_bytes: Count
    sha256: str


def save_checkpoint(run: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and delete all but the newest ``keep``.

    Raises:
        Gemma3ExportError: the disk is full or not writable; older checkpoints are kept.
    """
    folder = run / FOLDER
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_name(f".{path.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        record = _Record(step=step, size_bytes=partial.stat().st_size, sha256=sha256_of(partial))
        _record_of(path).unlink(missing_ok=True)
        partial.replace(path)
        write_text_atomically(_record_of(path), json.dumps(asdict(record)) + "\n")
    # torch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise Gemma3ExportError(
            f"cannot write the checkpoint of step {step}: {error}; {after_failure(run)}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    for old in checkpoint_steps(run)[:-keep]:
        for name in (folder / f"step-{old:08d}.json", folder / f"step-{old:08d}.pt"):
            name.unlink(missing_ok=True)
    return path


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint, damaged or not, in ascending order."""
    found = (CHECKPOINT.fullmatch(path.name) for path in (run / FOLDER).glob("step-*.pt"))
    return sorted(int(match[1]) for match in found if match)


def after_failure(run: Path) -> str:
    """Return what is left of a run that could not write, and what to do."""
    steps = checkpoint_steps(run)
    if not steps:
        return "there is no checkpoint to resume from: free some disk space and start again"
    return f"the checkpoint of step {steps[-1]} is kept: free some disk space and resume"


def load_latest_checkpoint(run: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Load the newest intact checkpoint; pass a line about each damaged one to ``report``.

    Raises:
        InputError: there is no intact checkpoint.
    """
    steps = checkpoint_steps(run)
    for step in reversed(steps):
        path = run / FOLDER / f"step-{step:08d}.pt"
        try:
            return _load(path)
        except InputError as error:
            report(f"{error}; falling back to the previous checkpoint")
    what = "no intact checkpoint" if steps else "no checkpoint"
    raise InputError(f"{run} has {what} to resume from; start a new run, or pass --force")


def get_rng_states(device: torch.device) -> dict[str, Any]:
    """Return all random states of this process, in types that ``weights_only`` loading accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore the result of :func:`get_rng_states`."""
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = states["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _load(path: Path) -> dict[str, Any]:
    if not is_file(_record_of(path)):
        raise InputError(f"checkpoint {path.name} is incomplete")
    try:
        record = read_record(_record_of(path), _Record, remedy="delete it")
        size, expected = check_regular(path), record.size_bytes
        if size != expected:
            raise InputError(f"checkpoint {path.name} is truncated: {size} of {expected} bytes")
        if sha256_of(path) != record.sha256:
            raise InputError(f"checkpoint {path.name} is damaged: its checksum does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in json or torch
        raise InputError(f"checkpoint {path.name} cannot be read: {str(error)[:200]}") from error
    assert isinstance(state, dict)
    return state


def _record_of(path: Path) -> Path:
    return path.with_suffix(".json")
