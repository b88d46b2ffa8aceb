"""Names of devices, as every backend and the command line spell them."""

from __future__ import annotations

from dataclasses import dataclass

from gemma3_export.errors import InputError

__all__ = ["Device", "parse_device"]


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live: ``cpu``, or ``cuda`` with an index."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def parse_device(text: str) -> Device | None:
    """``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is None.

    Raises:
        InputError: anything else.
    """
    if text == "auto":
        return None
    kind, colon, index = text.partition(":")
    if kind == "cpu" and not colon:
        return Device("cpu")
    if kind == "cuda" and (not colon or (index.isascii() and index.isdigit())):
        return Device("cuda", int(index or 0))
    raise InputError(f"unknown device {text!r}; choose auto, cpu, cuda or cuda:N")
