"""Describe the processor: its name, family and model, and the instructions that kernels use."""

from __future__ import annotations

import functools
import platform
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Processor", "read_processor"]

CPUINFO = Path("/proc/cpuinfo")  # Linux only
# Instruction sets that decide which matrix kernels run, under Linux's names: x86-64, then ARM.
INSTRUCTION_SETS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """What is known about a processor; family and model tell generations of one name apart."""

    name: str
    family: int | None = None
    model: int | None = None
    instruction_sets: tuple[str, ...] = ()  # those of INSTRUCTION_SETS that it has

    def __str__(self) -> str:
        """Return one line for people."""
        numbers = [
            f"{key} {number}"
            for key, number in (("family", self.family), ("model", self.model))
            if number is not None
        ]
        facts = "; ".join(filter(None, (", ".join(numbers), " ".join(self.instruction_sets))))
        return f"{self.name} ({facts})" if facts else self.name


@functools.cache
def read_processor() -> Processor:
    """Describe the processor of this machine, as far as the system tells."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return parse_cpuinfo(text, otherwise=platform.processor() or platform.machine())


def parse_cpuinfo(text: str, *, otherwise: str) -> Processor:
    """Return the first processor that the text of ``/proc/cpuinfo`` describes.

    Args:
        text: the file, empty if there is none.
        otherwise: the name of a processor that has none in the file, as on ARM.
    """
    found: dict[str, str] = {}
    for key, value in re.findall(r"^([^:\n]*?)\s*:[ \t]*(.*?)\s*$", text, re.MULTILINE):
        found.setdefault(key, value)
    flags = found.get("flags", found.get("Features", "")).split()
    return Processor(
        name=found.get("model name", otherwise),
        family=number(found.get("cpu family")),
        model=number(found.get("model")),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
    )


def number(text: str | None) -> int | None:
    """Return the number that ``text`` is, or None."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
