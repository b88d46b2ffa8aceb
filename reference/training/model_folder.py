"""Write a model as the folder that Hugging Face, and every command of ours, opens."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma3_export.bundle import write_hf_metadata
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.progress import Progress
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.staging import staged_directory, write_text_atomically
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

__all__ = ["export_hf_folder", "write_weights"]

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def write_weights(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replace ``model.safetensors`` in one step.

    Raises:
        Gemma3ExportError: the disk is full or cannot be written; what was there stays.
    """
    path = folder / "model.safetensors"
    partial = folder / ".model.safetensors.partial"
    try:
        _save({name: weight.detach().to(dtype) for name, weight in weights.items()}, partial)
        partial.replace(path)
    except OSError as error:
        raise Gemma3ExportError(f"cannot write {path}: {error}; free some space") from error
    finally:
        partial.unlink(missing_ok=True)


def export_hf_folder(
    source: WeightSource,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write any source of weights as a folder that ``transformers`` loads.

    Weights are written in shards, so no more than one of 4 GiB is in memory.

    Args:
        source: the weights and their config.
        output: the folder to create; it appears when it is complete.
        dtype: element type of the weights; None keeps what they are stored in.
        tokenizer: None takes the one that came with the weights, if any.
        force: replace an existing folder.
        progress: told the stage, and the bytes written and in all.

    Raises:
        InputError: the folder exists, a weight is not finite, or the tokenizer does not fit.
        Gemma3ExportError: the disk is full or cannot be written.
    """
    if tokenizer is None and (file := source.tokenizer_file()) is not None:
        tokenizer = load_tokenizer(file)
    if tokenizer is not None:
        tokenizer.check_vocab_size(source.config.vocab_size)
    with staged_directory(output, force=force) as folder:
        write_hf_metadata(folder, source.config, tokenizer)
        shards = _plan_shards(source, dtype)
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, 1 + len(shards))
        ]
        if len(shards) == 1:
            names = ["model.safetensors"]
        done, total = 0, sum(size for shard in shards for size in shard.values())
        for file_name, shard in zip(names, shards, strict=True):
            weights = {}
            for name, size in shard.items():
                weights[name] = _read(source, name, dtype)
                done += size
                if progress is not None:
                    progress("writing weights", done, total)
            _save(weights, folder / file_name)
        if len(shards) > 1:
            placed = {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            }
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            write_text_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _plan_shards(source: WeightSource, dtype: torch.dtype | None) -> list[dict[str, int]]:
    """Names and sizes in bytes, shard by shard."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in source.config.weight_shapes():
        size = torch.Size(shape).numel() * (dtype or source.stored_dtype(name)).itemsize
        if shards[-1] and sum(shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    return shards


def _read(source: WeightSource, name: str, dtype: torch.dtype | None) -> Tensor:
    rows = source.read(name)
    check_finite(name, rows)
    rows = rows.to(dtype or rows.dtype)
    check_finite(name, rows)  # float16 may have overflowed
    return rows


def _save(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({k: v.contiguous().cpu() for k, v in weights.items()}, path, {"format": "pt"})
        path.chmod(0o644)  # the library makes it private; a model is meant to be shared
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError:
        raise
    except Exception as error:  # the library wraps what the file system says
        raise OSError(str(error)) from error
