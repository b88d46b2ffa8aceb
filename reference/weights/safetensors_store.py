"""Safetensors files, single or sharded: headers checked first, rows read lazily."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open

from gemma3_export.config.hugging_face import load_json_object
from gemma3_export.errors import InputError
from gemma3_export.reference.weights.stores import StoredTensor, TensorStore

__all__ = ["SafetensorsStore", "read_shard_index"]

MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SafetensorsStore(TensorStore):
    """The tensors of one or more safetensors files; float64 is read as float32."""

    kind = "safetensors"

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.tensors: dict[str, StoredTensor] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in self.files:
            for name, tensor in _read_header(path).items():
                if name in self._file_of:
                    raise InputError(
                        f"{name} is both in {self._file_of[name].name} and {path.name}"
                    )
                self._file_of[name] = path
                self.tensors[name] = tensor

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :meth:`TensorStore.read`."""
        path = self._file_of[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            rows: torch.Tensor = self._open[path].get_slice(name)[start:stop]
        except Exception as error:  # the library raises its own and bare errors alike
            raise InputError(f"{path.name}: {name} cannot be read: {error}") from error
        return rows.to(self.tensors[name].dtype)

    def close(self) -> None:
        """Drop the mapped files."""
        self._open.clear()


def read_shard_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that ``model.safetensors.index.json`` names, and each tensor's shard.

    Raises:
        InputError: the index is malformed, points outside its folder, or shards are missing.
    """
    weight_map = load_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path.name} has no weight_map; download the folder again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise InputError(f"{path.name}: {name} is in {shard!r:.80}, which is no file name")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        shown = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
        raise InputError(
            f"{path.name} names {len(missing)} of {len(names)} shards that are missing: {shown}; "
            "download the folder again"
        )
    return [path.parent / name for name in names], weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        return _parse_header(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{path.name}: {error}; download the file again") from error


def _parse_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise InputError(f"{size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"it claims a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its header is not JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise InputError("its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _parse_entry(name, entry, size - 8 - length) for name, entry in header.items()}


def _parse_entry(name: str, entry: Any, data_bytes: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise InputError(f"the entry of {name!r:.80} is not an object")
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str):
        raise InputError(f"{name!r:.80} has no dtype")
    if kind not in _DTYPES:
        raise InputError(
            f"{name} is stored as {kind}, which is not supported; give a checkpoint in "
            f"{', '.join(_DTYPES)}, or a quantised one as GGUF"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise InputError(f"{name!r:.80} has a malformed shape or offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise InputError(f"{name} reaches to byte {end} of {data_bytes}; the file is truncated")
    dtype = _DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise InputError(f"{name} of shape {shape} does not fill its {end - begin} bytes")
    return StoredTensor(tuple(shape), torch.float32 if dtype == torch.float64 else dtype)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )
