"""Files of named tensors: GGUF, safetensors and PyTorch state dicts.

Stores know nothing about the meaning of names; weight sources build on them.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma3_export.config import load_json_object
from gemma3_export.dtypes import ELEMENT_TYPES, torch_dtype
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, open_regular
from gemma3_export.gguf_file import GgufTensor, open_gguf

__all__ = [
    "GgufStore",
    "SafetensorsStore",
    "TensorInfo",
    "TensorStore",
    "TorchStore",
    "read_shard_index",
]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape of a tensor in a file, and the element type that reading it gives."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorStore(ABC):
    """One or more open files of named tensors, with headers checked and no data read."""

    kind: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows [start, stop) of the stored tensor ``name``, in its ``dtype``.

        Raises:
            InputError: the file cannot be read.
        """

    def close(self) -> None:
        """Close the files."""
        return


class GgufStore(TensorStore):
    """The tensors of a GGUF file, split or not, dequantized to float32 when read."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.reader = open_gguf(path)
        self.files = self.reader.parts
        self.blocks: dict[str, GgufTensor] = {t.name: t for t in self.reader.tensors}
        for tensor in {t.tensor_type: t for t in self.reader.tensors}.values():
            tensor.dequantize_rows(0, 1)  # report unsupported types now, not halfway through
        self.tensors = {
            name: TensorInfo(tensor.shape, torch.float32) for name, tensor in self.blocks.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :meth:`TensorStore.read`; GGUF stores a vector as one row."""
        tensor = self.blocks[name]
        if len(tensor.shape) == 1:
            values = tensor.dequantize_rows(0, 1).reshape(-1)[start:stop]
            return torch.from_numpy(values.copy())
        if len(tensor.shape) != 2:
            raise InputError(
                f"tensor {name} has {len(tensor.shape)} axes, but weights have 1 or 2; the file is "
                "not a Gemma 3 checkpoint"
            )
        rows = tensor.dequantize_rows(start, stop)
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


# Safetensors files, single or sharded

MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
_DTYPES = {
    item.safetensors: torch_dtype(item.name)
    for item in ELEMENT_TYPES.values()
    if item.name.startswith(("float", "bfloat"))
}


class SafetensorsStore(TensorStore):
    """The tensors of one or more safetensors files; float64 is read as float32."""

    kind = "safetensors"

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in self.files:
            for name, tensor in _read_header(path).items():
                if name in self._file_of:
                    raise InputError(
                        f"{name} is in both {self._file_of[name].name} and {path.name}; remove one "
                        "of the files"
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
        except Exception as error:  # safetensors has no common error type
            raise InputError(
                f"{path.name}: cannot read {name} ({error}); download the file again"
            ) from error
        return rows.to(self.tensors[name].dtype)

    def close(self) -> None:
        """Unmap the files."""
        self._open.clear()


def read_shard_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Read the index of a sharded checkpoint; return the shards, and each tensor's shard.

    Raises:
        InputError: the index is malformed, refers outside of its folder, or lacks shards.
    """
    weight_map = load_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path.name} has no weight_map; download the folder again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise InputError(f"{path.name}: {name} is in {shard!r:.80}, which is not a file name")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not is_file(path.parent / name)]
    if missing:
        shown = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
        raise InputError(
            f"{len(missing)} of {len(names)} shards in {path.name} are missing: {shown}; "
            "download the folder again"
        )
    return [path.parent / name for name in names], weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with open_regular(path) as file:
        try:
            return _parse_header(file)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        except InputError as error:
            raise InputError(f"{path.name}: {error}; download the file again") from error


def _parse_header(file: BinaryIO) -> dict[str, TensorInfo]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise InputError(f"{size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise InputError(f"its header length is {length} bytes, but the file has only {size}")
    raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its header is not JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise InputError("its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _parse_entry(name, entry, size - 8 - length) for name, entry in header.items()}


def _parse_entry(name: str, entry: Any, data_bytes: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise InputError(f"the entry of {name!r:.80} is not an object")
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str):
        raise InputError(f"{name!r:.80} has no dtype")
    if kind.startswith("F8"):
        raise InputError(
            f"{name} has type {kind}: 8-bit floats, whose scales are separate tensors; use the "
            "bfloat16 checkpoint that they were made from, or a quantized GGUF file"
        )
    if kind not in _DTYPES:
        raise InputError(
            f"{name} has type {kind}, which is not supported; use a checkpoint in "
            f"{', '.join(_DTYPES)}, or a quantized GGUF file"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise InputError(f"{name!r:.80} has a malformed shape or offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise InputError(f"{name} ends at byte {end} of {data_bytes}; the file is truncated")
    dtype = _DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise InputError(f"{name} of shape {shape} does not match its {end - begin} bytes")
    return TensorInfo(tuple(shape), torch.float32 if dtype == torch.float64 else dtype)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


# PyTorch state dicts (.pt, .pth, .bin, .ckpt), read without running the code they may contain

CHECK_BYTES = 2**22  # read at once
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_CONFIGS = ("config", "model_config")
_CONFIG_MARKS = {"emb_dim", "model_type"}  # keys that distinguish a model's config from a trainer's


class TorchStore(TensorStore):
    """The tensors of a state dict, in one file or in shards; float64 is read as float32.

    Attributes:
        model_config: the model's config if the checkpoint has one, as parsed JSON.
    """

    kind = "torch"

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.model_config: dict[str, Any] | None = None
        self._state: dict[str, torch.Tensor] = {}
        for path in self.files:
            checkpoint = _load(path)
            self.model_config = self.model_config or _find_config(checkpoint)
            state = _find_state(checkpoint, path)
            if twice := sorted(state.keys() & self._state.keys()):
                raise InputError(
                    f"{twice[0]} is in {path.name} and in another shard; remove one of the files"
                )
            self._state |= state
        self.tensors = {
            name: TensorInfo(
                tuple(tensor.shape),
                torch.float32 if tensor.dtype == torch.float64 else tensor.dtype,
            )
            for name, tensor in self._state.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :meth:`TensorStore.read`."""
        # A lazy negation or conjugation is not part of the stored bytes, which others read.
        rows = self._state[name][start:stop].detach().resolve_neg().resolve_conj()
        return rows.to(self.tensors[name].dtype).contiguous()

    def close(self) -> None:
        """Unmap the file."""
        self._state = {}


def _load(path: Path) -> Any:
    try:
        with open_regular(path) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages of the legacy format
            # Only the zip format can be memory-mapped. Read as a whole, torch checks its records.
            can_map = is_zip and _has_whole_records(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise InputError(
                f"{path.name} contains code besides tensors, which is never run; save only the "
                "state dict (torch.save(model.state_dict(), ...)), or use safetensors"
            ) from error
        raise InputError(
            f"{path.name} is not a PyTorch checkpoint, or is damaged; get it again"
        ) from error
    except Exception as error:  # damaged files fail anywhere in torch
        raise InputError(
            f"{path.name} is not a PyTorch checkpoint, or is damaged: {str(error)[:200]}; get it "
            "again"
        ) from error


def _check_archive(path: Path) -> None:
    """Check what torch does not when it maps an archive: checksums, and that nothing is compressed.

    Raises:
        InputError: the archive is damaged, or was not written by torch.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise InputError(f"{path.name} has two records of one name; save it again with torch")
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"{path.name} is compressed ({record.filename:.80}), as torch never writes it; "
                    "save it again with torch"
                )
            if record.CRC == 0:  # torch.serialization.set_crc32_options(False)
                continue
            with archive.open(record) as content:  # raises an error at the end for a wrong checksum
                while content.read(CHECK_BYTES):
                    pass


def _has_whole_records(path: Path) -> bool:
    """Return whether each tensor's record is as long as the tensor; torch maps beyond its end."""
    sizes = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            sizes[record.header_offset + 30 + name_bytes + extra_bytes] = record.file_size
    try:
        with FakeTensorMode():
            state = _find_state(torch.load(path, map_location="cpu", weights_only=True), path)
        storages = [tensor.untyped_storage() for tensor in state.values()]
        return all(sizes[it._checkpoint_offset] == it.nbytes() for it in storages)
    except Exception:  # of files that loading as a whole rejects, too
        return False


def _find_config(checkpoint: Any) -> dict[str, Any] | None:
    if isinstance(checkpoint, Mapping):
        for key in _CONFIGS:
            value = checkpoint.get(key)
            if isinstance(value, dict) and value.keys() & _CONFIG_MARKS:
                return value
    return None


def _find_state(checkpoint: Any, path: Path) -> dict[str, torch.Tensor]:
    state = checkpoint
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise InputError(
            f"{path.name} has no state dict (a mapping of names to tensors); save one with "
            "torch.save(model.state_dict(), ...)"
        )
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path.name}: {str(name)[:80]!r} is {type(value).__name__}, not a tensor; "
                "save only the model's state dict"
            )
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"{path.name}: {name} is not a dense tensor; convert it before saving")
        found[name] = value
    return found
