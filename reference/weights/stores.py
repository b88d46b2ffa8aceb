"""Files of named tensors, whatever the names mean: the lowest layer of every weight source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma3_export.errors import InputError
from gemma3_export.gguf_file import GgufTensor, open_gguf

__all__ = ["GgufStore", "StoredTensor", "TensorStore"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Shape of a tensor in a file, and the element type that reading it gives."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorStore(ABC):
    """One or more files of named tensors, opened and checked, with nothing read yet."""

    kind: str
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the stored tensor ``name``, in its ``dtype``.

        Raises:
            InputError: the file cannot be read there.
        """

    def close(self) -> None:
        """Let go of the files."""
        return


class GgufStore(TensorStore):
    """The tensors of a GGUF file, dequantised to float32 when read."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.reader = open_gguf(path)
        self.files = (path,)
        self.blocks: dict[str, GgufTensor] = {t.name: t for t in self.reader.tensors}
        for tensor in {t.tensor_type: t for t in self.reader.tensors}.values():
            tensor.dequantize_rows(0, 1)  # a type that cannot be decoded is named here, not midway
        self.tensors = {
            name: StoredTensor(tensor.shape, torch.float32) for name, tensor in self.blocks.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :meth:`TensorStore.read`; a vector is one row of its file."""
        tensor = self.blocks[name]
        if len(tensor.shape) == 1:
            values = tensor.dequantize_rows(0, 1).reshape(-1)[start:stop]
            return torch.from_numpy(values.copy())
        if len(tensor.shape) != 2:
            raise InputError(f"tensor {name} has {len(tensor.shape)} axes; weights have 1 or 2")
        rows = tensor.dequantize_rows(start, stop)
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
