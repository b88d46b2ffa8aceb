"""Whether a loaded ONNX graph has the inputs and outputs that its bundle declares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma3_export.bundle.bundle import MANIFEST
from gemma3_export.bundle.signature import Axis, DType, Signature
from gemma3_export.errors import InputError

__all__ = ["check_interface"]

ELEMENT_TYPES: dict[DType, str] = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}
SHOWN = 2


def check_interface(session: Any, signature: Signature, graph: Path) -> None:
    """Refuse a graph that was swapped, or whose config was edited, before its first step.

    What does not show in a shape (the window's size, a rotation's base) is parity's business.

    Args:
        session: of the graph.
        signature: what config and manifest say about it.
        graph: its file, for the message.

    Raises:
        InputError: names, element types or extents differ.
    """
    problems = list(_problems(session, signature))
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(
            f"{graph} does not have the inputs and outputs that its config.json and {MANIFEST} "
            f"declare: {'; '.join(problems[:SHOWN])}{more}; restore the files or export it anew"
        )


def _problems(session: Any, signature: Signature) -> Iterator[str]:
    found = {
        value.name: value
        for value in (
            *session.get_inputs(),
            *session.get_overridable_initializers(),
            *session.get_outputs(),
        )
    }
    declared = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    for name, spec in declared.items():
        value = found.get(name)
        if value is None:
            yield f"{name} is missing"
        elif value.type != ELEMENT_TYPES[spec.dtype]:
            yield f"{name} is {value.type}, declared as {ELEMENT_TYPES[spec.dtype]}"
        elif not _agree(spec.axes, value.shape):
            yield f"{name} is {_text(value.shape)}, declared as {_text(spec.axes)}"
    yield from (f"{name} is not declared" for name in found if name not in declared)


def _agree(declared: tuple[Axis, ...], found: list[Any]) -> bool:
    """Whether all axes are the same, as far as both say an extent, or both a name."""
    return len(declared) == len(found) and all(
        wanted == axis or not isinstance(axis, type(wanted))
        for wanted, axis in zip(declared, found, strict=True)
    )


def _text(axes: Any) -> str:
    return f"[{', '.join(map(str, axes))}]"
