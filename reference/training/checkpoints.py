"""Checkpoints that are whole or not there: atomic, checksummed, rotated, with a way back.

A checkpoint is a file of tensors and a small JSON record of its size and SHA-256, written after it.
Only both together count, so a killed process, a full disk or a truncated copy is noticed, and the
one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.staging import write_text_atomically

__all__ = ["checkpoint_steps", "load_latest_checkpoint", "save_checkpoint"]

FOLDER = "checkpoints"
HASH_BYTES = 2**20


def save_checkpoint(run: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and drop all but the newest ``keep``.

    Raises:
        Gemma3ExportError: the disk is full or cannot be written; older checkpoints are untouched.
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
        record = {"step": step, "size_bytes": partial.stat().st_size, "sha256": _sha256(partial)}
        _record_of(path).unlink(missing_ok=True)
        partial.replace(path)
        write_text_atomically(_record_of(path), json.dumps(record) + "\n")
    # torch's writer reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise Gemma3ExportError(
            f"cannot write the checkpoint of step {step}: {error}; older checkpoints are kept, "
            "free some space and resume"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    for old in checkpoint_steps(run)[:-keep]:
        for name in (folder / f"step-{old:08d}.json", folder / f"step-{old:08d}.pt"):
            name.unlink(missing_ok=True)
    return path


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of which there is a checkpoint, damaged or not, in rising order."""
    found = (run / FOLDER).glob("step-*.pt")
    return sorted(int(path.stem.removeprefix("step-")) for path in found)


def load_latest_checkpoint(run: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The newest checkpoint that is whole; ``report`` is told of those that are not.

    Raises:
        InputError: there is none.
    """
    steps = checkpoint_steps(run)
    for step in reversed(steps):
        path = run / FOLDER / f"step-{step:08d}.pt"
        try:
            return _load(path)
        except InputError as error:
            report(f"{error}; falling back to the checkpoint before it")
    what = "no whole checkpoint" if steps else "no checkpoint"
    raise InputError(f"{run} has {what} to resume from; start a new run, or pass --force")


def _load(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_record_of(path).read_text(encoding="utf-8"))
        size, expected = path.stat().st_size, record["size_bytes"]
        if size != expected:
            raise InputError(f"checkpoint {path.name} is truncated: {size} of {expected} bytes")
        if _sha256(path) != record["sha256"]:
            raise InputError(f"checkpoint {path.name} is damaged: its checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"checkpoint {path.name} was not written to its end") from None
    except Exception as error:  # a damaged file fails anywhere inside json or torch
        raise InputError(f"checkpoint {path.name} cannot be read: {str(error)[:200]}") from error
    assert isinstance(state, dict)
    return state


def _record_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
