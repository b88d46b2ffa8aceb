"""Options as dataclasses that keyword arguments can change."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

__all__ = ["merged"]

Options = TypeVar("Options")


def merged(kind: type[Options], options: Options | None, changes: Mapping[str, Any]) -> Options:
    """Return ``options``, or the defaults of ``kind``, with ``changes`` applied.

    Raises:
        TypeError: a change names no field of ``kind``; the message suggests the nearest one.
        InputError: a value is out of range.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(known)}"
            raise TypeError(f"unknown option {name!r}; {hint}")
    return replace(kind() if options is None else options, **changes)  # type: ignore[type-var]
