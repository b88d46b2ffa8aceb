"""The numbers that the libraries below us take: one place that checks those of every caller.

ONNX Runtime and torch hold counts in 32 bits and generators take seeds of 64; beyond that they
raise an error of their own, wrap around or allocate until the process is killed.
"""

from __future__ import annotations

import math
import os
import re
from numbers import Integral, Real
from typing import Any

from gemma3_export.errors import InputError

__all__ = [
    "BELOW_1",
    "CPU_PREFILL_CHUNK",
    "MAX_COUNT",
    "MAX_KLD",
    "MAX_SEED",
    "MAX_SIZE_BYTES",
    "PREFILL_CHUNK",
    "QUEUE_LIMIT",
    "SLOTS",
    "TOKEN_ID",
    "check_integer",
    "check_number",
    "check_threads",
    "is_number",
    "max_threads",
    "shown",
]

MAX_COUNT = 2**31 - 1
TOKEN_ID = re.compile(r"[0-9]{1,10}")  # in text
MAX_SEED = 2**63 - 1  # generators take a bit more, numpy's integers do not
MAX_SIZE_BYTES = 2**63 - 1
BELOW_1 = math.nextafter(1, 0)
MAX_KLD = 100.0  # nats per token; a uniform guess among all of Gemma's tokens diverges by 12.5
SLOTS = 8  # of an engine, by default
QUEUE_LIMIT = 256  # of an engine, by default
PREFILL_CHUNK = 512  # prompt tokens of a step, by default
# The same in an engine on the CPU while other requests are generating. The 270M in w8a8 takes 24 to
# 36 ms for so many on an Ice Lake Xeon, and 37 to 39 ms for a step of 8 answers.
CPU_PREFILL_CHUNK = 32
THREADS_PER_PROCESSOR = 4  # more only wait for each other: 1,000 threads take minutes to start


def max_threads() -> int:
    """Return the maximum number of threads that may be asked for."""
    return THREADS_PER_PROCESSOR * (os.cpu_count() or 1)


def check_integer(name: str, value: Any, least: int = 1, most: int = MAX_COUNT) -> int:
    """Return ``value`` if it is an integer from ``least`` to ``most``.

    Raises:
        InputError: it is not; the message calls it ``name``.
    """
    if not is_number(value, Integral) or not least <= value <= most:
        raise InputError(
            f"{name} is {shown(value)}; it must be an integer of at least {least} and at most "
            f"{most}"
        )
    return int(value)


def check_number(
    name: str, value: Any, least: float, most: float, *, is_open: bool = False
) -> float:
    """Return ``value`` if it is a number from ``least`` to ``most``.

    Args:
        name: what the message calls it.
        value: the number; NaN is within no range.
        least: the lower bound.
        most: the upper bound.
        is_open: ``least`` itself is not allowed.

    Raises:
        InputError: it is not.
    """
    is_legal = is_number(value, Real) and (least < value if is_open else least <= value)
    if not is_legal or not value <= most:
        words = f"above {least:g}" if is_open else f"of at least {least:g}"
        end = "" if math.isinf(most) else f" and at most {most:g}"
        raise InputError(f"{name} is {shown(value)}; it must be a number {words}{end}")
    return float(value)


def check_threads(threads: Any) -> int | None:
    """Return ``threads`` if it is None or a sensible number of threads.

    Raises:
        InputError: it is not.
    """
    if threads is None:
        return None
    most = max_threads()
    if not is_number(threads, Integral) or not 1 <= threads <= most:
        raise InputError(
            f"threads is {shown(threads)}; it must be an integer of at least 1 and at most {most}, "
            f"{THREADS_PER_PROCESSOR} times the processors of this machine"
        )
    return int(threads)


def is_number(value: object, kind: type) -> bool:
    """Return whether ``value`` is a number of ``kind``; bool, a number to Python, is not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def shown(value: object) -> str:
    """Return ``value`` for a message, in at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "an integer of more than 4,300 digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
