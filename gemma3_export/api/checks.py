"""Checks of the fields of options, light enough for ``--help`` to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from gemma3_export.device import CudaOptions
from gemma3_export.dtypes import require_max_kld
from gemma3_export.errors import InputError
from gemma3_export.files import to_path
from gemma3_export.limits import MAX_COUNT, check_integer, shown

__all__ = [
    "check_budget",
    "check_callables",
    "check_cuda",
    "check_flags",
    "check_integers",
    "check_json",
    "check_paths",
    "check_texts",
]


def check_integers(options: object, least: int, *names: str, most: int = MAX_COUNT) -> None:
    """Check that fields are integers from ``least`` to ``most``.

    Here and below, None passes if it is the field's default.

    Raises:
        InputError: one is not.
    """
    for name in _given(options, names):
        check_integer(name, getattr(options, name), least, most)


def check_budget(options: object) -> None:
    """Check the field ``max_kld``, a divergence in nats per token.

    Raises:
        InputError: it is not a positive number of at most 100.
    """
    for name in _given(options, ("max_kld",)):
        require_max_kld(getattr(options, name))


def check_flags(options: object, *names: str) -> None:
    """Check that fields are True or False, because any text would count as True.

    Raises:
        InputError: one is not.
    """
    _check(options, names, lambda value: isinstance(value, bool), "True or False")


def check_texts(options: object, *names: str) -> None:
    """Check that fields are strings.

    Raises:
        InputError: one is not.
    """
    _check(options, names, lambda value: isinstance(value, str), "a string")


def check_paths(options: object, *names: str) -> None:
    """Check that fields are paths that a file can have.

    Raises:
        InputError: one is not.
    """
    for name in _given(options, names):
        to_path(getattr(options, name), name)


def check_callables(options: object, *names: str) -> None:
    """Check that fields can be called.

    Raises:
        InputError: one cannot.
    """
    _check(options, names, callable, "a function")


def check_cuda(options: object) -> None:
    """Check the field ``cuda``.

    Raises:
        InputError: it is not :class:`CudaOptions`.
    """
    _check(options, ("cuda",), lambda value: isinstance(value, CudaOptions), "CudaOptions")


def check_json(options: object, *names: str, is_list: bool = False) -> None:
    """Check that fields are mappings with string keys, or lists of such mappings.

    Raises:
        InputError: one is not.
    """
    if is_list:
        _check(options, names, _is_list_of_objects, "a list of JSON objects")
    else:
        _check(options, names, _is_object, "a mapping with string keys")


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_object, value))


def _check(
    options: object, names: Sequence[str], is_legal: Callable[[Any], bool], words: str
) -> None:
    for name in _given(options, names):
        if not is_legal(value := getattr(options, name)):
            raise InputError(f"{name} is {shown(value)}; it must be {words}")


def _given(options: object, names: Sequence[str]) -> list[str]:
    """Return the names of fields that are not None by default and None now."""
    defaults = {field.name: field.default for field in fields(options)}  # type: ignore[arg-type]
    return [
        name for name in names if not (getattr(options, name) is None and defaults[name] is None)
    ]
