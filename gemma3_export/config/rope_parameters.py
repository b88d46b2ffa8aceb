"""Read the parameters of RoPE from ``config.json``, in the flat and the nested dialect.

The flat dialect has ``rope_theta``, ``rope_local_base_freq`` and ``rope_scaling`` at the top level;
the nested one has ``rope_parameters``, with one object per kind of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma3_export.errors import InputError

__all__ = ["read_rope"]

_ROPE_FIELDS = ("rope_theta", "rope_local_base_freq", "rope_scaling_factor")
_ROPE_KEYS = {"rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings"}


def read_rope(text: Mapping[str, Any]) -> dict[str, float]:
    """Read the ``rope_*`` fields of :class:`Gemma3Config` from the flat and the nested dialect.

    Raises:
        InputError: the scaling type is not supported, or the two dialects contradict each other.
    """
    flat, nested = _read_flat_rope(text), _read_nested_rope(text)
    for key in _ROPE_FIELDS:
        if key in flat and key in nested and flat[key] != nested[key]:
            raise InputError(
                f"{key} is {nested[key]!r:.80} in rope_parameters, but {flat[key]!r:.80} in the "
                "flat keys; keep one dialect"
            )
    return flat | nested


def _read_flat_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: text[key] for key in _ROPE_FIELDS[:2] if text.get(key) is not None}
    scaling = text.get("rope_scaling")
    if scaling is not None:
        factor, theta = _read_rope_parameters(scaling, where="rope_scaling")
        found["rope_scaling_factor"] = factor
        if theta is not None and found.setdefault("rope_theta", theta) != theta:
            raise InputError(
                f"rope_scaling.rope_theta ({theta!r:.80}) contradicts rope_theta; keep one"
            )
    return found


def _read_nested_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    parameters = text.get("rope_parameters")
    if parameters is None:
        return {}
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(parameters, dict) or not set(parameters) <= kinds:
        raise InputError(
            f"rope_parameters is {parameters!r:.100}; it must have one object for "
            "full_attention and one for sliding_attention"
        )
    found: dict[str, Any] = {}
    if parameters.get("full_attention") is not None:
        factor, theta = _read_rope_parameters(
            parameters["full_attention"], where="rope_parameters.full_attention"
        )
        found["rope_scaling_factor"] = factor
        if theta is not None:
            found["rope_theta"] = theta
    if parameters.get("sliding_attention") is not None:
        where = "rope_parameters.sliding_attention"
        factor, theta = _read_rope_parameters(parameters["sliding_attention"], where=where)
        if factor != 1.0:
            raise InputError(
                f"{where}.factor is {factor!r:.80}; Gemma 3 scales only full attention"
            )
        if theta is not None:
            found["rope_local_base_freq"] = theta
    return found


def _read_rope_parameters(parameters: object, *, where: str) -> tuple[Any, Any]:
    """Return the scaling factor and the base (None if missing) of one set of parameters."""
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
    unknown = {k: v for k, v in parameters.items() if k not in _ROPE_KEYS and v is not None}
    if unknown.pop("partial_rotary_factor", 1.0) != 1.0 or unknown:
        raise InputError(f"{where} is {parameters!r:.120}; its extra keys are not supported")
    factor = parameters.get("factor")
    if kind == "linear" and factor is None:
        raise InputError(f"{where} is linear without a factor; add one")
    if kind == "default" and factor not in (None, 1.0):
        raise InputError(f"{where}.factor is {factor!r:.60} but its rope_type is default; drop one")
    return (1.0 if factor is None else factor), parameters.get("rope_theta")
