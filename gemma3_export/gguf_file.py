"""Open GGUF files: validate the header, then provide metadata and memory-mapped tensors.

The reader of the package ``gguf`` creates an array object per vocabulary entry, which takes seconds
for 262,144 entries, and it trusts all lengths in the file. This reader makes one pass over the
header, checks every number against the file size, and leaves the tensor data on disk. Fields and
tensors have the names of ``gguf.GGUFReader``, so code that reads metadata works with both.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import check_regular, to_path

__all__ = [
    "GgufField",
    "GgufFile",
    "GgufTensor",
    "first_of_split",
    "gguf_module",
    "open_gguf",
]

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_KEY_BYTES = 65_535
_MAX_FIELDS = 100_000
_MAX_TENSORS = 100_000
_MAX_ARRAY_ITEMS = 2**24  # bounds parsing time; Gemma's vocabulary has 2**18 entries
_MAX_DIMS = 4
_MAX_ALIGNMENT = 2**20
_MAX_PARTS = 9999
# The naming rule of llama.cpp, which finds the parts of a split file by their names.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GgufField:
    """A metadata entry; its value is decoded on access."""

    name: str
    _data: memoryview
    _offset: int  # of the first item
    _kind: int  # type of the value, or of the items of an array
    _count: int | None  # number of items of an array; None for a single value

    def contents(self, index: int | None = None) -> Any:
        """Return the value (a list for an array), or item ``index`` of an array.

        Raises:
            InputError: a string is not UTF-8.
        """
        if self._count is None:
            return self._decode(1)[0]
        if index is None:
            return self._decode(self._count)
        return self._decode(index + 1)[index]

    @property
    def size(self) -> int:
        """Return the number of items; 1 for a single value."""
        return 1 if self._count is None else self._count

    def _decode(self, count: int) -> list[Any]:
        if self._kind != _STRING:
            return list(
                struct.unpack_from(f"<{count}{_SCALARS[self._kind]}", self._data, self._offset)
            )
        found, offset = [], self._offset
        try:
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", self._data, offset)
                offset += 8
                found.append(str(self._data[offset : offset + length], "utf-8"))
                offset += length
        except UnicodeDecodeError as error:
            raise InputError(
                f"GGUF metadata {self.name} is not UTF-8 text; download the file again"
            ) from error
        return found


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor, quantized and memory-mapped."""

    name: str
    tensor_type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # in torch's order, the reverse of the order in the file
    n_bytes: int
    data_offset: int  # from the start of the file
    data: npt.NDArray[np.uint8]  # [rows, bytes per row], memory-mapped

    def dequantize_rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Dequantize rows [start, stop) of the tensor, viewed as a matrix, to float32.

        Raises:
            InputError: ``gguf`` cannot decode this quantization type.
        """
        gguf = gguf_module()
        try:
            with np.errstate(all="ignore"):  # callers report values that are not finite
                rows = gguf.quants.dequantize(
                    np.ascontiguousarray(self.data[start:stop]), self.tensor_type
                )
        except NotImplementedError as error:
            raise InputError(
                f"tensor {self.name} has quantization type {self.tensor_type.name}, which cannot "
                "be decoded; use a file in F32, F16, BF16, Q8_0, Q4_0 or a K-quant"
            ) from error
        return np.asarray(rows, dtype=np.float32).reshape(stop - start, self.shape[-1])


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A validated GGUF file, whose tensors are read-only views of the mapped file.

    The parts of a split file are one :class:`GgufFile` with the metadata of the first part.
    """

    path: Path
    fields: Mapping[str, GgufField]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    parts: tuple[Path, ...]  # all files; of a file that is not split, ``path`` alone

    def get_field(self, key: str) -> GgufField | None:
        """Return the metadata entry ``key``, or None."""
        return self.fields.get(key)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of the metadata entry ``key``, or ``default`` if it is missing."""
        field = self.fields.get(key)
        return default if field is None else field.contents()


def gguf_module() -> Any:
    """Import the package ``gguf``, which decodes the block formats.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UnavailableError(
            "GGUF files need the package gguf; run: pip install 'gemma3-export[export]'"
        ) from error
    return gguf


def open_gguf(path: str | Path) -> GgufFile:
    """Validate the header of a GGUF file and map its tensors.

    Any part of a split file opens all parts, which lie in one folder under llama.cpp's names
    (``model-00001-of-00003.gguf``).

    Raises:
        InputError: the file or a part of it is missing, truncated, corrupt, or of an unsupported
            version.
        UnavailableError: the package ``gguf`` is not installed.
    """
    path = to_path(path)
    part = _open_part(path)
    count = part.value("split.count", 0)
    if not isinstance(count, int) or not 0 <= count <= _MAX_PARTS:
        raise InputError(f"{path.name}: split.count is {count!r:.20}; download the file again")
    return part if count <= 1 else _open_split(path, count)


def _open_part(path: Path) -> GgufFile:
    gguf = gguf_module()
    check_regular(path)
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be mapped: {error}; give a readable .gguf file") from error
    try:
        return _Header(data, gguf).parse(path)
    except InputError as error:
        raise InputError(f"{path.name}: {error}; download the file again") from error


def _open_split(path: Path, count: int) -> GgufFile:
    """Open all parts of a split file, of which ``path`` is any."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise InputError(
            f"{path.name}: split.count is {count}: this is one part of a split GGUF, but its name "
            f"does not end in -00001-of-{count:05}.gguf; restore the original names of the parts, "
            "or merge them with `llama-gguf-split --merge`"
        )
    paths = tuple(
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    )
    if missing := [part.name for part in paths if not part.exists()]:
        raise InputError(
            f"{path.name}: {len(missing)} of {count} parts are missing: {', '.join(missing[:10])}; "
            "download all parts into one folder"
        )
    files = [_open_part(part) for part in paths]
    for number, file in enumerate(files):
        stated = (file.value("split.no"), file.value("split.count"))
        if stated != (number, count):
            raise InputError(
                f"{file.path.name}: split.no and split.count are {stated!r:.40}, not "
                f"{(number, count)}; the parts are of different files; download them again"
            )
    tensors = tuple(tensor for file in files for tensor in file.tensors)
    total = files[0].value("split.tensors.count", len(tensors))
    if len({tensor.name for tensor in tensors}) != len(tensors) or total != len(tensors):
        raise InputError(
            f"{path.name}: the parts have {len(tensors)} tensors, some of them twice or too few "
            f"(split.tensors.count is {total!r:.20}); download them again"
        )
    return replace(files[0], tensors=tensors, parts=paths)


def first_of_split(paths: Sequence[Path]) -> Path | None:
    """Return the first part if ``paths`` are all parts of one split GGUF file, else None."""
    matches = [_PART.fullmatch(path.name) for path in paths]
    kinds = {(match["stem"], match["count"]) if match else None for match in matches}
    if len(paths) < 2 or len(kinds) != 1 or None in kinds:
        return None
    return min(paths, key=lambda path: path.name)


class _Header:
    """A parser of the header that checks every number against the file size before use."""

    def __init__(self, data: npt.NDArray[np.uint8], gguf: Any) -> None:
        self.array = data
        self.view = data.data
        self.size = len(self.view)
        self.offset = 0
        self.gguf = gguf

    def parse(self, path: Path) -> GgufFile:
        tensor_count = self._start()
        (field_count,) = self._take("Q")
        if field_count > min(_MAX_FIELDS, self.size // 13):
            raise InputError(f"the header claims {field_count} metadata entries")
        if tensor_count > min(_MAX_TENSORS, self.size // 24):
            raise InputError(f"the header claims {tensor_count} tensors")
        fields: dict[str, GgufField] = {}
        for _ in range(field_count):
            field = self._field()
            if field.name in fields:
                raise InputError(f"metadata {field.name} occurs twice")
            fields[field.name] = field
        alignment = self._alignment(fields)
        infos = [self._tensor_info(alignment) for _ in range(tensor_count)]
        start = -(-self.offset // alignment) * alignment
        tensors = {info[0]: self._map(start, *info) for info in infos}
        if len(tensors) != len(infos):
            raise InputError("two tensors have the same name")
        by_offset = sorted(tensors.values(), key=lambda tensor: tensor.data_offset)
        for one, other in pairwise(by_offset):
            if one.data_offset + one.n_bytes > other.data_offset:
                raise InputError(
                    f"tensors {one.name} and {other.name} share bytes; the file is corrupt"
                )
        return GgufFile(
            path=path,
            fields=MappingProxyType(fields),
            tensors=tuple(tensors.values()),
            alignment=alignment,
            parts=(path,),
        )

    def _start(self) -> int:
        if bytes(self.view[:4]) != b"GGUF":
            raise InputError("this is not a GGUF file (it does not start with GGUF)")
        self.offset = 4
        (version,) = self._take("I")
        if version not in (2, 3):
            big_endian = version in (2 << 24, 3 << 24)
            kind = "is big-endian" if big_endian else f"has GGUF version {version}"
            raise InputError(f"the file {kind}; only little-endian versions 2 and 3 are supported")
        (tensor_count,) = self._take("Q")
        return int(tensor_count)

    def _take(self, codes: str) -> tuple[Any, ...]:
        try:
            found = struct.unpack_from("<" + codes, self.view, self.offset)
        except struct.error:
            raise InputError("the header ends early; the file is truncated or corrupt") from None
        self.offset += struct.calcsize("<" + codes)
        return found

    def _skip(self, size_bytes: int) -> None:
        if size_bytes > self.size - self.offset:
            raise InputError(
                f"the header claims {size_bytes} bytes, but {self.size - self.offset} are left; "
                "the file is truncated or corrupt"
            )
        self.offset += size_bytes

    def _name(self) -> str:
        (length,) = self._take("Q")
        if length > _MAX_KEY_BYTES:
            raise InputError(f"the header has a name of {length} bytes")
        start = self.offset
        self._skip(length)
        try:
            return str(self.view[start : self.offset], "utf-8")
        except UnicodeDecodeError:
            raise InputError("a name in the header is not UTF-8; the file is corrupt") from None

    def _field(self) -> GgufField:
        name = self._name()
        (kind,) = self._take("I")
        count = None
        if kind == _ARRAY:
            kind, count = self._take("IQ")
            if count > _MAX_ARRAY_ITEMS:
                raise InputError(f"metadata {name} claims {count} items")
        if kind not in _SCALARS and kind != _STRING:
            raise InputError(f"metadata {name} has type {kind}, which is not supported")
        field = GgufField(name, self.view, self.offset, kind, count)
        items = 1 if count is None else count
        if kind == _STRING:
            if 8 * items > self.size - self.offset:  # otherwise a huge count takes long to parse
                raise InputError(f"metadata {name} claims {items} strings; the file is corrupt")
            for _ in range(items):
                self._skip(self._take("Q")[0])
        else:
            self._skip(items * struct.calcsize("<" + _SCALARS[kind]))
        return field

    @staticmethod
    def _alignment(fields: Mapping[str, GgufField]) -> int:
        field = fields.get("general.alignment")
        value = 32 if field is None else field.contents()
        is_power = (
            isinstance(value, int) and 0 < value <= _MAX_ALIGNMENT and not value & (value - 1)
        )
        if not is_power or isinstance(value, bool):
            raise InputError(f"general.alignment is {value!r:.40}; it must be a power of two")
        return int(value)

    def _tensor_info(self, alignment: int) -> tuple[str, tuple[int, ...], Any, int]:
        name = self._name()
        (dims,) = self._take("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise InputError(f"tensor {name} claims {dims} dimensions")
        shape = tuple(reversed(self._take(f"{dims}Q")))
        kind, offset = self._take("IQ")
        try:
            tensor_type = self.gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise InputError(f"tensor {name} has the unknown type {kind}") from None
        if offset % alignment:
            raise InputError(f"tensor {name} starts at {offset}, not at a multiple of {alignment}")
        return name, shape, tensor_type, offset

    def _map(
        self, start: int, name: str, shape: tuple[int, ...], tensor_type: Any, offset: int
    ) -> GgufTensor:
        block, block_bytes = self.gguf.GGML_QUANT_SIZES[tensor_type]
        if 0 in shape or shape[-1] % block:
            raise InputError(f"tensor {name} cannot have shape {shape} as {tensor_type.name}")
        row_bytes = shape[-1] // block * block_bytes
        rows = math.prod(shape[:-1])
        first, size = start + offset, rows * row_bytes
        if first + size > self.size:
            raise InputError(
                f"tensor {name} ends at byte {first + size}, but the file has {self.size}; "
                "the file is truncated or corrupt"
            )
        data = self.array[first : first + size].reshape(rows, row_bytes)
        return GgufTensor(name, tensor_type, shape, size, first, data)
