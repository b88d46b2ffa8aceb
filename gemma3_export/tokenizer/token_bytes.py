"""The bytes that a vocabulary entry stands for, in the two kinds of tokenizer that occur."""

from __future__ import annotations

import json
import re

import tokenizers

from gemma3_export.errors import InputError

__all__ = ["character_of_byte", "has_byte_level_decoder", "piece_bytes"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_GEMMA_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def has_byte_level_decoder(backend: tokenizers.Tokenizer) -> bool:
    """Whether ``backend`` writes bytes as GPT-2 does (True) or as Gemma does (False).

    Raises:
        InputError: it does neither.
    """
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    if state.get("type") == "ByteLevel":
        return True
    if state.get("type") == "Sequence" and state.get("decoders") == _GEMMA_DECODERS:
        return False
    raise InputError(
        f"the tokenizer's decoder is {json.dumps(state):.200}; only Gemma's (Replace, "
        "ByteFallback, Fuse) and GPT-2's (ByteLevel) are supported"
    )


def piece_bytes(piece: str, *, is_byte_level: bool) -> bytes:
    """The bytes of the vocabulary entry ``piece``."""
    if is_byte_level:
        try:
            return bytes([_BYTE_OF_CHARACTER[character] for character in piece])
        except KeyError:  # an added token, which is kept as it is written
            return piece.encode()
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def character_of_byte() -> dict[int, str]:
    """GPT-2's way to write bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + offset) for offset, byte in enumerate(rest)}


_BYTE_OF_CHARACTER = {character: byte for byte, character in character_of_byte().items()}
