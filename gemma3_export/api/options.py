"""Options of loading and generating, as dataclasses that keyword arguments can change."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from gemma3_export.device import CudaOptions
from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.sampling import SamplingParams

__all__ = ["GenerateOptions", "LoadOptions", "merged"]

PREFIX_CACHE_BYTES = 256_000_000
Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """Options of :func:`gemma3_export.load`: the runtime, the device, the caches.

    Args:
        runtime: ``onnx``, ``torchscript``, ``pt2`` or ``reference``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads; None lets the backend choose.
        cuda: what may be done on a GPU; ignored on the CPU.
        trust: load a torch archive although it is not the one that was exported.
        sliding_window_cache: whether sliding layers cache only their window; None is whatever
            suits the prompts. Generation opens the runtime again, once, where prompts share a
            prefix that such caches could not copy.
        shares_weights: share an fp32 bundle's weights between all processes that run it on the CPU.
        kept_prefix_bytes: memory for prompt prefixes that are kept between calls; 0 keeps none.
    """

    runtime: str = "onnx"
    device: str = "auto"
    threads: int | None = None
    cuda: CudaOptions | None = None
    trust: bool = False
    sliding_window_cache: bool | None = None
    shares_weights: bool = False
    kept_prefix_bytes: int = 0

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}; it must be at least 1")
        if self.kept_prefix_bytes < 0:
            raise InputError(f"kept_prefix_bytes is {self.kept_prefix_bytes}; it must be 0 or more")
        if self.kept_prefix_bytes and self.sliding_window_cache:
            raise InputError(
                "kept_prefix_bytes needs caches that hold every token; leave "
                "sliding_window_cache out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(SamplingParams):
    """Options of a generation, including every sampling parameter. The defaults are greedy.

    Args:
        max_new_tokens: the most tokens to generate per prompt.
        stop: texts that end a generation; they are cut off the result.
        prompt_lookup: the most tokens to draft by looking up what followed the same words before;
            0 is off, None is 16 on the CPU and off for quantised bundles and on CUDA.
        draft_model: a smaller bundle that drafts tokens instead.
        prefix_cache_bytes: memory for prefixes that the prompts of one call share; 0 is off.
        prefill_chunk: prompt tokens to process per step.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int = 128
    stop: str | tuple[str, ...] = ()
    prompt_lookup: int | None = None
    draft_model: Path | str | None = None
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        for name in ("prompt_lookup", "prefix_cache_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} is {value}; it must be 0 or more")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters, with a seed drawn where none was given."""
        names = [field.name for field in fields(SamplingParams)]
        values = {name: getattr(self, name) for name in names}
        if values["seed"] is None:
            values["seed"] = secrets.randbits(32)
        return SamplingParams(**values)


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
