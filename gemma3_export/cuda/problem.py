"""One thing that is wrong."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is wrong, and what to run or do about it."""

    what: str
    fix: str
    blocks: bool = True  # the device cannot be used before it is solved
