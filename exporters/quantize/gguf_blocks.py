"""Convert the quantized blocks of a GGUF file to block formats, without changing any weight.

The layouts are those of ggml's ``block_*`` structures (ggml-common.h). Every supported type equals
``scale * (code - zero point) - minimum`` with float32 scales: a half-precision scale times a small
integer needs at most 19 bits, so no product is rounded.

Shapes: N rows, G blocks that share a scale, S super-blocks of 256 weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from gemma3_export.bundle import BlockFormat
from gemma3_export.errors import InputError
from gemma3_export.gguf_file import GgufTensor
from gemma3_export.reference.weights.block_matrix import BlockMatrix

__all__ = ["gguf_format", "read_gguf_blocks"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Unpacked = tuple[Bytes, Floats, Floats | None]  # codes [N, K], scales [N, G], minimums [N, G]

FLOAT_TYPES = ("F32", "F16", "BF16", "F64")


def halves(data: Bytes) -> Floats:
    """Read float16 numbers: [..., 2] bytes to [...] float32."""
    return np.ascontiguousarray(data).view(np.float16)[..., 0].astype(np.float32)


def nibbles(data: Bytes) -> Bytes:
    """Split bytes into nibbles: [..., n] to [..., 2, n], low nibbles first."""
    return np.stack((data & 15, data >> 4), axis=-2)


def bits_of(data: Bytes) -> Bytes:
    """Split bytes into bits: [..., n] to [..., 8 n], lowest bit first."""
    return np.unpackbits(data, axis=-1, bitorder="little")


def q4_0(blocks: Bytes) -> Unpacked:
    """Unpack [N, G, 18]: a scale, then 16 bytes of nibbles."""
    return nibbles(blocks[..., 2:]).reshape(len(blocks), -1), halves(blocks[..., :2]), None


def q8_0(blocks: Bytes) -> Unpacked:
    """Unpack [N, G, 34]: a scale, then 32 signed bytes."""
    codes = blocks[..., 2:] ^ np.uint8(128)
    return codes.reshape(len(blocks), -1), halves(blocks[..., :2]), None


def q5_0(blocks: Bytes) -> Unpacked:
    """Unpack [N, G, 22]: a scale, the fifth bits, then 16 bytes of nibbles."""
    codes = nibbles(blocks[..., 6:]).reshape(*blocks.shape[:2], 32)
    codes += bits_of(blocks[..., 2:6]) * np.uint8(16) + np.uint8(128 - 16)
    return codes.reshape(len(blocks), -1), halves(blocks[..., :2]), None


def k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Unpack [N, S, 12] to 6-bit scales and minimums of eight blocks, each [N, S, 8]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=-1)
    minimums = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=-1)
    return scales, minimums


def k_floats(blocks: Bytes) -> tuple[Floats, Floats]:
    """Return scales and minimums [N, G] of Q4_K and Q5_K blocks, which share a header."""
    scales, minimums = k_scales(blocks[..., 4:16])
    rows = len(blocks)
    return (
        (halves(blocks[..., :2])[..., None] * scales.astype(np.float32)).reshape(rows, -1),
        (halves(blocks[..., 2:4])[..., None] * minimums.astype(np.float32)).reshape(rows, -1),
    )


def q4_k(blocks: Bytes) -> Unpacked:
    """Unpack [N, S, 144]: four times 32 bytes, whose low and high nibbles are blocks of 32."""
    quarters = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    return nibbles(quarters).reshape(len(blocks), -1), *k_floats(blocks)


def q5_k(blocks: Bytes) -> Unpacked:
    """Unpack [N, S, 176]: like Q4_K, plus 32 bytes in which bit b belongs to block b."""
    high = blocks[..., 16:48]
    quarters = blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)
    low = nibbles(quarters).reshape(*blocks.shape[:2], 8, 32)
    fifth = high[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return (low + (fifth << 4) + 128).reshape(len(blocks), -1), *k_floats(blocks)


def q6_k(blocks: Bytes) -> Unpacked:
    """Unpack [N, S, 210]: low nibbles, pairs of high bits, 16 signed scales, a common scale."""
    shape = blocks.shape[:2]
    low = nibbles(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
    pairs = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    high = pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = low + np.uint8(16) * high.astype(np.uint8) + np.uint8(128 - 32)
    small = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    scales: Floats = halves(blocks[..., 208:])[..., None] * small
    return codes.reshape(len(blocks), -1), scales.reshape(len(blocks), -1), None


# ggml type to (bytes per block, format, function that unpacks)
TYPES: dict[str, tuple[int, BlockFormat, Callable[[Bytes], Unpacked]]] = {
    "Q4_0": (18, BlockFormat(bits=4, block_size=32), q4_0),
    "Q5_0": (22, BlockFormat(bits=8, block_size=32), q5_0),
    "Q8_0": (34, BlockFormat(bits=8, block_size=32), q8_0),
    "Q4_K": (144, BlockFormat(bits=4, block_size=32, has_minimum=True), q4_k),
    "Q5_K": (176, BlockFormat(bits=8, block_size=32, has_minimum=True), q5_k),
    "Q6_K": (210, BlockFormat(bits=8, block_size=16), q6_k),
}


def gguf_format(tensor: GgufTensor) -> BlockFormat | None:
    """Return the format that represents ``tensor`` without loss, None for float types.

    Raises:
        InputError: the quantization has no equivalent.
    """
    kind = tensor.tensor_type.name
    if kind in FLOAT_TYPES:
        return None
    if kind not in TYPES:
        raise InputError(
            f"tensor {tensor.name} is quantized as {kind}, which --dtype keep does not support "
            f"(supported: {', '.join(TYPES)}); export with --dtype int8 or fp32"
        )
    return TYPES[kind][1]


def read_gguf_blocks(tensor: GgufTensor, start: int, stop: int) -> BlockMatrix:
    """Read rows [start, stop) of a quantized tensor."""
    size, block_format, unpack = TYPES[tensor.tensor_type.name]
    data = np.ascontiguousarray(tensor.data[start:stop])
    codes, scales, minimums = unpack(data.reshape(stop - start, -1, size))
    return BlockMatrix(
        block_format,
        torch.from_numpy(np.ascontiguousarray(codes)),
        torch.from_numpy(np.ascontiguousarray(scales)),
        None if minimums is None else torch.from_numpy(np.ascontiguousarray(minimums)),
    )
