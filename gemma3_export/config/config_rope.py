"""Reads the rotary embedding's settings from the flat and from the nested dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma3_export.errors import InputError

__all__ = ["read_rope"]

_FIELDS = ("rope_theta", "rope_local_base_freq", "rope_scaling_factor")
_KNOWN = {"rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings"}


def read_rope(text: Mapping[str, Any]) -> dict[str, float]:
    """The ``rope_*`` fields of :class:`Gemma3Config` that ``text`` states, in either dialect.

    Raises:
        InputError: an unsupported kind of scaling, or two dialects that contradict each other.
    """
    flat, nested = _read_flat(text), _read_nested(text)
    for key in _FIELDS:
        if key in flat and key in nested and flat[key] != nested[key]:
            raise InputError(
                f"rope_parameters says {key} is {nested[key]!r:.80}, the flat keys say "
                f"{flat[key]!r:.80}; keep one dialect"
            )
    return flat | nested


def _read_flat(text: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: text[key] for key in _FIELDS[:2] if text.get(key) is not None}
    scaling = text.get("rope_scaling")
    if scaling is not None:
        factor, theta = _read_kind(scaling, where="rope_scaling")
        found["rope_scaling_factor"] = factor
        if theta is not None and found.setdefault("rope_theta", theta) != theta:
            raise InputError(f"rope_scaling.rope_theta ({theta!r:.80}) contradicts rope_theta")
    return found


def _read_nested(text: Mapping[str, Any]) -> dict[str, Any]:
    parameters = text.get("rope_parameters")
    if parameters is None:
        return {}
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(parameters, dict) or not set(parameters) <= kinds:
        raise InputError(
            f"rope_parameters is {parameters!r:.100}; it must hold one object for each of "
            "full_attention and sliding_attention"
        )
    found: dict[str, Any] = {}
    if parameters.get("full_attention") is not None:
        factor, theta = _read_kind(
            parameters["full_attention"], where="rope_parameters.full_attention"
        )
        found["rope_scaling_factor"] = factor
        if theta is not None:
            found["rope_theta"] = theta
    if parameters.get("sliding_attention") is not None:
        where = "rope_parameters.sliding_attention"
        factor, theta = _read_kind(parameters["sliding_attention"], where=where)
        if factor != 1.0:
            raise InputError(
                f"{where}.factor is {factor!r:.80}; Gemma 3 scales only full attention"
            )
        if theta is not None:
            found["rope_local_base_freq"] = theta
    return found


def _read_kind(parameters: object, *, where: str) -> tuple[Any, Any]:
    """Scaling factor and base (None when not stated) of one set of rope parameters."""
    if not isinstance(parameters, dict):
        raise InputError(f"{where} is {parameters!r:.60}; it must be an object")
    kind, old_kind = parameters.get("rope_type"), parameters.get("type")
    if kind is not None and old_kind is not None and kind != old_kind:
        raise InputError(
            f"{where}: rope_type {kind!r:.80} and type {old_kind!r:.80} contradict each other"
        )
    kind = kind if kind is not None else (old_kind if old_kind is not None else "default")
    if kind not in ("default", "linear"):
        raise InputError(
            f"{where}.rope_type is {kind!r:.60}; only default and linear are supported"
        )
    unknown = {k: v for k, v in parameters.items() if k not in _KNOWN and v is not None}
    if unknown.pop("partial_rotary_factor", 1.0) != 1.0 or unknown:
        raise InputError(f"{where} is {parameters!r:.120}; its extra keys are not supported")
    factor = parameters.get("factor")
    if kind == "linear" and factor is None:
        raise InputError(f"{where} is linear without a factor; add one")
    if kind == "default" and factor not in (None, 1.0):
        raise InputError(f"{where}.factor is {factor!r:.60} but its rope_type is default; drop one")
    return (1.0 if factor is None else factor), parameters.get("rope_theta")
