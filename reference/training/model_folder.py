"""Write models as Hugging Face folders, which transformers and every command here can open."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from gemma3_export.bundle import write_hf_metadata
from gemma3_export.config import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.progress import Progress
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.staging import staged_directory, write_text_atomically
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

__all__ = ["export_hf_folder", "write_weights"]

SHARD_BYTES = 4 * 2**30


def write_weights(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write ``model.safetensors``, replacing the file atomically.

    Args:
        folder: folder of the model.
        weights: tensors by canonical name.
        dtype: dtype to store the weights in.

    Raises:
        Gemma3ExportError: the disk is full or not writable; an existing file is kept.
    """
    path = folder / SAFE_WEIGHTS_NAME
    partial = folder / ".model.safetensors.partial"
    try:
        _save({name: weight.detach().to(dtype) for name, weight in weights.items()}, partial)
        partial.replace(path)
    except OSError as error:
        raise Gemma3ExportError(f"cannot write {path}: {error}; free some disk space") from error
    finally:
        partial.unlink(missing_ok=True)


def export_hf_folder(
    source: WeightSource,
    output: Path | str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write any source of weights as a folder that ``transformers`` can load.

    Weights are written in shards of up to 4 GiB, one of which is in memory at a time.

    Args:
        source: the weights and their config.
        output: the folder to create; it appears once it is complete.
        dtype: dtype of the weights; None keeps the stored one.
        tokenizer: the tokenizer to include; None takes that of the source, if any.
        force: replace an existing folder.
        progress: receives the stage, and the bytes done and in total.

    Raises:
        InputError: the folder exists, a weight is not finite, or the tokenizer does not fit.
        Gemma3ExportError: the disk is full or not writable.
    """
    if tokenizer is None and (file := source.tokenizer_file()) is not None:
        tokenizer = load_tokenizer(file)
    if tokenizer is not None:
        source.keep_rows(tokenizer.vocab_size)
        tokenizer.check_vocab_size(source.config.vocab_size)
    with staged_directory(output, force=force) as folder:
        write_hf_metadata(folder, source.config, tokenizer, source.generation_config())
        sizes = {
            name: math.prod(shape) * (dtype or source.stored_dtype(name)).itemsize
            for name, shape in source.config.weight_shapes()
        }
        shards = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            get_storage_id=lambda size: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES,
        )
        done, total = 0, sum(sizes.values())
        for file_name, names in shards.filename_to_tensors.items():
            weights = {}
            for name in names:
                weights[name] = _read(source, name, dtype)
                done += sizes[name]
                if progress is not None:
                    progress("writing weights", done, total)
            _save(weights, folder / file_name)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_text_atomically(
                folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n"
            )


def _read(source: WeightSource, name: str, dtype: torch.dtype | None) -> Tensor:
    rows = source.read(name)
    check_finite(name, rows)
    rows = rows.to(dtype or rows.dtype)
    check_finite(name, rows)  # conversion to float16 may overflow
    return rows


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, as those of a checkpoint may; safetensors writes none."""
    apart, seen = {}, set()
    for name, weight in weights.items():
        whole = weight.cpu().contiguous()
        storage = whole.untyped_storage()
        if storage.nbytes() != whole.nbytes or storage.data_ptr() in seen:
            whole = whole.clone()
        seen.add(storage.data_ptr())
        apart[name] = whole
    return apart


def _save(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(_apart(weights), path, {"format": "pt"})
        path.chmod(0o644)  # safetensors creates it with 0o600, but a model is meant to be shared
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError:
        raise
    except Exception as error:  # safetensors wraps errors of the file system
        raise OSError(str(error)) from error
