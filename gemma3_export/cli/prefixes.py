"""When ``generate`` computes what its prompts share only once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from gemma3_export.cli.options import memory_size

if TYPE_CHECKING:
    from gemma3_export.bundle import Bundle
    from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
    from gemma3_export.runtimes.protocol import Runtime

__all__ = ["cache_size", "may_share", "prefix_cache_for", "shared_length"]

FEWEST_TOKENS = 16  # less is computed sooner than it is copied


def cache_size(text: str) -> int:
    """Bytes in a size such as ``256MB``; 0 is allowed.

    Raises:
        click.BadParameter: it is no size.
    """
    return 0 if text.strip() == "0" else memory_size(text)


def may_share(
    bundle: Bundle,
    runtime: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_bytes: int,
    prefill_chunk: int,
) -> bool:
    """Whether :func:`prefix_cache_for` may want the runtime's caches to keep every token."""
    fewest = prefill_chunk if bundle.is_quantized(runtime) else FEWEST_TOKENS
    return bool(max_bytes) and shared_length(prompts) >= max(fewest, FEWEST_TOKENS)


def prefix_cache_for(
    runtime: Runtime,
    bundle: Bundle,
    prompts: Sequence[Sequence[int]],
    *,
    max_bytes: int,
    prefill_chunk: int,
) -> PrefixCache | None:
    """A cache, if it is wanted and two of the prompts share enough.

    Quantised products amplify the rounding between one division into chunks and another, and on
    CUDA nothing of it has been measured: there only whole chunks are reused, which changes no bit.
    """
    from gemma3_export.runtimes.generation.prefix_cache import PrefixCache

    is_exact = bundle.is_quantized(runtime.name) or str(runtime.describe()["device"]) != "cpu"
    granularity = prefill_chunk if is_exact else FEWEST_TOKENS
    if not max_bytes or shared_length(prompts) < max(granularity, FEWEST_TOKENS):
        return None
    return PrefixCache(runtime, max_bytes=max_bytes, granularity=granularity)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens some two prompts have in common."""
    longest = 0
    for one, other in pairwise(sorted(map(list, prompts))):  # the most alike stand together
        ends = min(len(one), len(other))
        same = next((at for at in range(ends) if one[at] != other[at]), ends)
        longest = max(longest, same)
    return longest
