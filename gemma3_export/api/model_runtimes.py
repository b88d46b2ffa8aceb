"""Decide which runtimes, caches and drafts the generations of a model use.

A runtime opens with the caches that the first prompts need and is opened again when later prompts
need others. Prefixes that prompts share and draft models are kept for as long as the runtime is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma3_export.api.model_files import Weights, open_files, tokenizer_of
from gemma3_export.api.opening import open_runtime, warm_up
from gemma3_export.api.options import GenerateOptions, LoadOptions
from gemma3_export.api.prompts import shared_length
from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.speculation import (
    MAX_DRAFT_TOKENS,
    Drafter,
    DraftModel,
    PromptLookup,
    relative_cost,
)
from gemma3_export.runtimes.protocol import CacheVariants, Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = ["MIN_SHARED_TOKENS", "ModelRuntimes"]

MIN_SHARED_TOKENS = 16  # fewer are computed sooner than they are copied


class ModelRuntimes:
    """The runtime of a model and those of its draft models; safe to share between threads.

    Args:
        files: the bundle or the weights to open.
        tokenizer: its tokenizer, which draft models must share.
        options: how to open it.
    """

    def __init__(
        self, files: Bundle | Weights, tokenizer: Tokenizer | None, options: LoadOptions
    ) -> None:
        self._files = files
        self._tokenizer = tokenizer
        self._options = options
        self._runtime: Runtime | None = None
        self._prefixes: PrefixCache | None = None  # kept between calls
        self._drafts: dict[Path, Runtime] = {}
        self._opening = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the runtime is open."""
        return self._runtime is not None

    def open(self) -> Runtime:
        """Return the runtime; open it if it is not open yet.

        Raises:
            InputError: the bundle is damaged or has no graph for the runtime.
            UnavailableError: a package or the device is missing.
        """
        return self._open(needs_every_token=self._options.kept_prefix_bytes > 0)

    def open_for(self, prompts: Sequence[list[int]], options: GenerateOptions) -> Runtime:
        """Return the runtime, with caches that suit a batch of prompts, given as token ids.

        Raises:
            InputError: as :meth:`open`.
            UnavailableError: as :meth:`open`.
        """
        return self._open(self._needs_every_token(prompts, options))

    def close(self) -> None:
        """Release all runtimes and caches."""
        with self._opening:
            self._runtime = self._prefixes = None
            self._drafts.clear()

    def draft_tokens(self, runtime: Runtime, options: GenerateOptions) -> int:
        """Return how many tokens prompt lookup may draft per step; 0 if it is off."""
        if options.prompt_lookup is not None:
            return options.prompt_lookup
        return 0 if _is_inexact(runtime) else MAX_DRAFT_TOKENS

    def drafter(
        self, runtime: Runtime, prompts: Sequence[list[int]], options: GenerateOptions
    ) -> Callable[[], Drafter] | None:
        """Return a factory of drafters, one per prompt; None if no tokens are drafted.

        Raises:
            InputError: the draft model is damaged, or has another tokenizer.
        """
        if options.draft_model is None:
            return PromptLookup if self.draft_tokens(runtime, options) else None
        draft = self._draft_runtime(Path(options.draft_model))
        token_cost = relative_cost(draft, runtime)
        capacity = max(map(len, prompts), default=0) + options.max_new_tokens
        return lambda: DraftModel(draft, capacity=capacity, token_cost=token_cost)

    def prefix_cache(
        self, runtime: Runtime, prompts: Sequence[list[int]], options: GenerateOptions
    ) -> PrefixCache | None:
        """Return the cache of prefixes to use; None if there is too little to share."""
        if (kept := self.kept_prefixes(runtime)) is not None:
            return kept
        granularity = _granularity(runtime)
        fewest = max(granularity or options.own_prefill_chunk, MIN_SHARED_TOKENS)
        if not options.prefix_cache_bytes or _evicts(runtime) or shared_length(prompts) < fewest:
            return None
        return PrefixCache(runtime, max_bytes=options.prefix_cache_bytes, granularity=granularity)

    def kept_prefixes(self, runtime: Runtime) -> PrefixCache | None:
        """Return the cache of prefixes that is kept between calls; None if none is."""
        size = self._options.kept_prefix_bytes
        if not size:
            return None
        with self._opening:
            if self._prefixes is None or self._prefixes.runtime is not runtime:
                self._prefixes = PrefixCache(
                    runtime, max_bytes=size, granularity=_granularity(runtime)
                )
            return self._prefixes

    def _open(self, needs_every_token: bool) -> Runtime:
        """Open the runtime, again if its sliding-window caches evict tokens that are needed."""
        with self._opening:
            wanted = self._options.sliding_window_cache
            is_free = wanted is None
            if self._runtime is None or (needs_every_token and is_free and _evicts(self._runtime)):
                self._runtime = None  # release its memory first
                self._runtime = self._open_files(
                    self._files,
                    sliding_window_cache=False if needs_every_token and is_free else wanted,
                    shares_weights=self._options.shares_weights,
                )
            return self._runtime

    def _open_files(self, files: Bundle | Weights, **own: Any) -> Runtime:
        """Open a runtime with the options that the model and its draft models have in common."""
        names = ("runtime", "device", "threads", "trust", "cuda", "huge_pages")
        runtime = open_runtime(
            files, **own, **{name: getattr(self._options, name) for name in names}
        )
        if self._options.warm_up:
            warm_up(runtime)
        return runtime

    def _needs_every_token(self, prompts: Sequence[list[int]], options: GenerateOptions) -> bool:
        """Return whether caches must hold every token rather than a sliding window.

        Drafts longer than a window could not be taken back, and no prefix could be copied from the
        middle of a text.
        """
        if self._options.kept_prefix_bytes:
            return True
        if (options.prompt_lookup or 0) >= self._files.config.sliding_window:
            return True
        is_quantized = self._files.is_quantized(self._options.runtime)
        fewest = options.own_prefill_chunk if is_quantized else MIN_SHARED_TOKENS
        return bool(options.prefix_cache_bytes) and shared_length(prompts) >= max(
            fewest, MIN_SHARED_TOKENS
        )

    def _draft_runtime(self, path: Path) -> Runtime:
        """Open the draft model at ``path``, once.

        Raises:
            InputError: it is damaged, or has another tokenizer.
        """
        with self._opening:
            if path not in self._drafts:
                draft = open_files(path)
                if self._options.check:
                    draft.check_files()
                own = tokenizer_of(draft)
                if self._tokenizer and own and not own.has_tokens_of(self._tokenizer):
                    raise InputError(
                        f"the draft model in {path} has another tokenizer than the model; give "
                        "one of the same family"
                    )
                # Wrong drafts are removed from the cache as far back as they go.
                self._drafts[path] = self._open_files(draft, sliding_window_cache=False)
            return self._drafts[path]


def _granularity(runtime: Runtime) -> int | None:
    """Return the granularity of prefix reuse; None is whole prefill chunks."""
    return None if _is_inexact(runtime) else MIN_SHARED_TOKENS


def _is_inexact(runtime: Runtime) -> bool:
    """Return whether several tokens at once may give other bits than one at a time.

    Quantized products amplify the rounding between one division into steps and another, and on
    CUDA it has not been measured. There, drafts are off and only whole prefill chunks are
    reused, which changes no bit.
    """
    return runtime.info.is_quantized or runtime.info.device.kind != "cpu"


def _evicts(runtime: Runtime) -> bool:
    """Return whether the runtime's caches let go of tokens outside the sliding window."""
    return isinstance(runtime, CacheVariants) and runtime.uses_sliding_window_cache
