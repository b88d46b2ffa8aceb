"""Load a bundle and generate text with it.

    import gemma3_export

    model = gemma3_export.load("gemma-3-270m")
    print(model.generate("The sea is", max_new_tokens=64).text)

Everything that a generation needs beyond its prompt is decided here, for Python and the command
line alike: which caches the runtime opens, whether tokens are drafted, whether prompts share a
computed prefix, and which tokens end a turn.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard, overload

import numpy as np
from numpy.typing import NDArray

from gemma3_export.api.opening import open_runtime
from gemma3_export.api.options import GenerateOptions, LoadOptions, merged
from gemma3_export.bundle import Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.kept_cache import KeptCache
from gemma3_export.runtimes.generation.loop import (
    Cancel,
    Completion,
    Generation,
    GenerationOptions,
    TokenEvent,
)
from gemma3_export.runtimes.generation.loop import generate as start_generation
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.speculation import (
    MAX_DRAFT_TOKENS,
    Drafter,
    DraftModel,
    PromptLookup,
    relative_cost,
)
from gemma3_export.runtimes.protocol import CacheVariants, IntArray, Logits, Runtime
from gemma3_export.tokenizer import ChatMessage, StreamingDecoder, Tokenizer

__all__ = ["Chat", "Model", "Prompt", "TextStream", "bundle_tokenizer", "load", "shared_length"]

Prompt = str | Sequence[int] | IntArray | Sequence[ChatMessage]
CHAT_CAPACITY = 4096  # tokens that a conversation starts with room for; it doubles as needed
BINARY = (bytes, bytearray, memoryview)
FEWEST_SHARED_TOKENS = 16  # fewer are computed sooner than they are copied


class TextStream(Iterator[str]):
    """The text of one generation, piece by piece.

    Iterate it for text as it is certain; ``completion`` is the result so far, complete once the
    iteration has ended. ``close`` stops early, and so does leaving a ``with`` block.

    Args:
        generation: the generation of one prompt.
        on_end: receives the completion when the stream has ended or is closed, or None if it
            failed.
    """

    def __init__(
        self, generation: Generation, on_end: Callable[[Completion | None], None] | None = None
    ) -> None:
        self._generation = generation
        self._on_end = on_end
        self._ending = threading.Lock()

    def __next__(self) -> str:
        try:
            for event in self._generation:
                if isinstance(event, TokenEvent) and event.text:
                    return event.text
        except BaseException:
            self._end(has_failed=True)
            raise
        self._end()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; ``completion`` keeps the text so far. Any thread may close a stream."""
        self._generation.close()
        self._end()

    @property
    def completion(self) -> Completion:
        """The result so far; its finish reason is ``cancelled`` until the end."""
        return self._generation.completions[0]

    def _end(self, has_failed: bool = False) -> None:
        with self._ending:
            on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(None if has_failed else self.completion)


def load(path: Path | str | Bundle, options: LoadOptions | None = None, **changes: Any) -> Model:
    """Load a bundle, ready to generate.

    Args:
        path: the folder of an exported bundle.
        options: which runtime to open, and on which device.
        changes: fields of :class:`LoadOptions`, such as ``device="cpu"``.

    Raises:
        InputError: the folder is not a bundle, is damaged, or has no such graph.
        UnavailableError: a package or the device is missing.
    """
    model = Model(path, options, **changes)
    model.open()
    return model


class Model:
    """A bundle that generates text; safe to share between threads.

    Constructing it reads the bundle's manifest, config and tokenizer. The runtime opens with
    :meth:`open`, or with the first generation, which then picks the caches that suit its prompts.

    Args:
        path: the folder of an exported bundle.
        options: which runtime to open, and on which device.
        changes: fields of :class:`LoadOptions`.

    Raises:
        InputError: the folder is not a bundle, its tokenizer is not its model's, or ``check`` finds
            a file that was changed.
    """

    def __init__(
        self, path: Path | str | Bundle, options: LoadOptions | None = None, **changes: Any
    ) -> None:
        self.options = merged(LoadOptions, options, changes)
        self.bundle = path if isinstance(path, Bundle) else Bundle(Path(path))
        if self.options.check:
            self.bundle.check_files()
        self.tokenizer = bundle_tokenizer(self.bundle)
        self._runtime: Runtime | None = None
        self._prefixes: PrefixCache | None = None  # kept between calls
        self._drafts: dict[Path, Runtime] = {}
        self._opening = threading.Lock()

    def __repr__(self) -> str:
        return f"Model({str(self.bundle.path)!r}, runtime={self.options.runtime!r})"

    @property
    def config(self) -> Gemma3Config:
        """The model's shapes and constants."""
        return self.bundle.config

    @property
    def runtime(self) -> Runtime:
        """The runtime; opens it if it is not open yet."""
        return self.open()

    def open(self) -> Runtime:
        """Open the runtime unless it is open, and return it.

        Raises:
            InputError: the bundle is damaged or has no graph for the runtime.
            UnavailableError: a package or the device is missing.
        """
        return self._open(needs_every_token=self.options.kept_prefix_bytes > 0)

    def close(self) -> None:
        """Release the runtime and its memory; the next generation opens it again."""
        with self._opening:
            self._runtime = self._prefixes = None
            self._drafts.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @overload
    def generate(
        self,
        prompt: str | Sequence[ChatMessage] | Sequence[int] | IntArray,
        options: GenerateOptions | None = None,
        **changes: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[ChatMessage]],
        options: GenerateOptions | None = None,
        **changes: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Any,
        options: GenerateOptions | None = None,
        **changes: Any,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or a list of prompts as one batch.

        Args:
            prompt: a text, token ids, or the messages of a conversation; or a list of these.
            options: how to sample, when to stop, and so on.
            changes: fields of :class:`GenerateOptions`, such as ``max_new_tokens=64``.

        Returns:
            One completion, or for a list of prompts a list of them in the same order.

        Raises:
            InputError: a prompt is empty, does not fit, or needs a tokenizer that the bundle lacks;
                or an option is out of range.
        """
        if is_one_prompt(prompt):
            return self.start([prompt], options, **changes).collect()[0]
        return self.start(prompt, options, **changes).collect()

    def stream(
        self, prompt: Prompt, options: GenerateOptions | None = None, **changes: Any
    ) -> TextStream:
        """Continue one prompt and yield its text as it is generated.

        Raises:
            InputError: as :meth:`generate`; or there is a list of prompts.
        """
        if not is_one_prompt(prompt):
            raise InputError("stream takes one prompt; generate takes a list of them")
        return TextStream(self.start([prompt], options, **changes))

    def chat(
        self, system: str | None = None, options: GenerateOptions | None = None, **changes: Any
    ) -> Chat:
        """Start a conversation, whose history and cache are kept between its turns.

        Args:
            system: a system message.
            options: for every turn.
            changes: fields of :class:`GenerateOptions`.

        Raises:
            InputError: the bundle's tokenizer has neither a chat template nor Gemma's turn tokens.
        """
        return Chat(self, system, merged(GenerateOptions, options, changes))

    def logits(self, token_ids: Sequence[int] | IntArray) -> Logits:
        """Return the logits [T, V], float32, that follow each of the T tokens.

        Raises:
            InputError: there are no tokens, or more than the model's context holds, or they are
                not integers of the vocabulary.
        """
        checked = checked_token_ids(token_ids)
        if not checked:
            raise InputError("there are no token ids; give at least one")
        if not 0 <= min(checked) <= max(checked) < self.config.vocab_size:
            raise InputError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, and these are from "
                f"{min(checked)} to {max(checked)}"
            )
        ids = np.array(checked, np.int64)
        cache = self.runtime.new_cache(1, ids.size)
        size = GenerateOptions().prefill_chunk
        chunks = [ids[None, start : start + size] for start in range(0, ids.size, size)]
        parts = [self.runtime.step(chunk, cache, num_logits=0)[0] for chunk in chunks]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def start(
        self,
        prompts: Sequence[Prompt],
        options: GenerateOptions | None = None,
        *,
        cancel: Cancel | None = None,
        kept_cache: KeptCache | Callable[[Runtime], KeptCache] | None = None,
        **changes: Any,
    ) -> Generation:
        """Start a generation of events, which gives more than :meth:`generate` and :meth:`stream`.

        Args:
            prompts: texts, token ids or conversations.
            options: how to sample, when to stop, and so on.
            cancel: an event or a function, checked before every step.
            kept_cache: the cache of an earlier generation to continue, for a single prompt; or a
                function that returns it for the runtime that generates.
            changes: fields of :class:`GenerateOptions`.

        Raises:
            InputError: as :meth:`generate`.
        """
        options = merged(GenerateOptions, options, changes)
        if not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, str | bytes):
            raise InputError(
                f"start takes a list of prompts, not {type(prompts).__name__}; put a single prompt "
                "into a list"
            )
        if not (kept_cache is None or isinstance(kept_cache, KeptCache) or callable(kept_cache)):
            raise TypeError(f"kept_cache must be a KeptCache, not {kept_cache!r:.60}")
        token_ids = [self.encode(prompt) for prompt in prompts]
        stop_token_ids = self._stop_token_ids(prompts)
        runtime = self._open(self._needs_every_token(token_ids, options))
        draft_tokens = options.prompt_lookup
        if draft_tokens is None:
            draft_tokens = 0 if self._is_inexact(runtime) else MAX_DRAFT_TOKENS
        tokenizer = self.tokenizer
        return start_generation(
            runtime,
            token_ids,
            options.sampling(),
            GenerationOptions(
                max_new_tokens=options.max_new_tokens,
                stop_token_ids=stop_token_ids,
                stop_texts=options.stop_texts,
                prefill_chunk=options.prefill_chunk,
                max_draft_tokens=draft_tokens or MAX_DRAFT_TOKENS,
            ),
            detokenize=None if tokenizer is None else lambda: StreamingDecoder(tokenizer),
            drafter=self._drafter(runtime, token_ids, options, draft_tokens),
            prefix_cache=self._prefix_cache(runtime, token_ids, options),
            kept_cache=kept_cache(runtime) if callable(kept_cache) else kept_cache,
            cancel=cancel,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            InputError: it is no prompt, the bundle has no tokenizer for it, or it cannot be
                encoded.
        """
        if not isinstance(prompt, str) and not is_conversation(prompt):
            return checked_token_ids(prompt)
        if self.tokenizer is None:
            raise InputError(
                f"{self.bundle.path} has no tokenizer, so it takes no text; give token ids, or "
                "export it again with a tokenizer"
            )
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(prompt)

    def stop_token_ids(self, *, is_chat: bool) -> tuple[int, ...]:
        """Return the tokens that end a generation.

        A conversation also ends where the chat template ends the model's turn, which the configs
        of base models do not say.
        """
        ends = self.tokenizer.chat.end_token_ids if is_chat and self.tokenizer else ()
        return tuple(dict.fromkeys((*self.config.eos_token_id, *ends)))

    def _stop_token_ids(self, prompts: Sequence[Prompt]) -> tuple[int, ...]:
        """Return the tokens that end a generation of ``prompts``.

        Raises:
            InputError: some prompts are conversations, which end with another token than the rest.
        """
        kinds = {self.stop_token_ids(is_chat=is_conversation(prompt)) for prompt in prompts}
        if len(kinds) > 1:
            raise InputError(
                "conversations end with other tokens than the rest of the prompts; generate them "
                "in two calls"
            )
        return kinds.pop() if kinds else ()

    def _open(self, needs_every_token: bool) -> Runtime:
        """Open the runtime, again if its sliding-window caches evict tokens that are needed."""
        with self._opening:
            wanted = self.options.sliding_window_cache
            is_free = wanted is None
            if self._runtime is None or (needs_every_token and is_free and evicts(self._runtime)):
                self._runtime = None  # release its memory first
                self._runtime = open_runtime(
                    self.bundle,
                    sliding_window_cache=False if needs_every_token and is_free else wanted,
                    shares_weights=self.options.shares_weights,
                    **self._how_to_open(),
                )
            return self._runtime

    def _how_to_open(self) -> dict[str, Any]:
        """Return what the model and a draft model have in common."""
        names = ("runtime", "device", "threads", "trust", "cuda")
        return {name: getattr(self.options, name) for name in names}

    def _needs_every_token(self, prompts: Sequence[list[int]], options: GenerateOptions) -> bool:
        """Return whether caches must hold every token rather than a sliding window.

        Drafts longer than a window could not be taken back, and no prefix could be copied from the
        middle of a text.
        """
        if self.options.kept_prefix_bytes:
            return True
        if (options.prompt_lookup or 0) >= self.config.sliding_window:
            return True
        is_quantized = self.bundle.is_quantized(self.options.runtime)
        fewest = options.prefill_chunk if is_quantized else FEWEST_SHARED_TOKENS
        return bool(options.prefix_cache_bytes) and shared_length(prompts) >= max(
            fewest, FEWEST_SHARED_TOKENS
        )

    def _is_inexact(self, runtime: Runtime) -> bool:
        """Return whether several tokens at once may give other bits than one at a time.

        Quantized products amplify the rounding between one division into steps and another, and on
        CUDA it has not been measured. There, drafts are off and only whole prefill chunks are
        reused, which changes no bit.
        """
        return runtime.info.is_quantized or runtime.info.device.kind != "cpu"

    def _prefix_cache(
        self, runtime: Runtime, prompts: Sequence[list[int]], options: GenerateOptions
    ) -> PrefixCache | None:
        """Return the cache of prefixes to use, if there is enough to share."""
        granularity = options.prefill_chunk if self._is_inexact(runtime) else FEWEST_SHARED_TOKENS
        if size := self.options.kept_prefix_bytes:
            with self._opening:
                if self._prefixes is None or self._prefixes.runtime is not runtime:
                    self._prefixes = PrefixCache(runtime, max_bytes=size, granularity=granularity)
                return self._prefixes
        fewest = max(granularity, FEWEST_SHARED_TOKENS)
        if not options.prefix_cache_bytes or evicts(runtime) or shared_length(prompts) < fewest:
            return None
        return PrefixCache(runtime, max_bytes=options.prefix_cache_bytes, granularity=granularity)

    def _drafter(
        self,
        runtime: Runtime,
        prompts: Sequence[list[int]],
        options: GenerateOptions,
        draft_tokens: int,
    ) -> Callable[[], Drafter] | None:
        """Return what makes a drafter per prompt, if tokens are to be drafted."""
        if options.draft_model is None:
            return PromptLookup if draft_tokens else None
        draft = self._draft_runtime(Path(options.draft_model))
        token_cost = relative_cost(draft, runtime)
        capacity = max(map(len, prompts), default=0) + options.max_new_tokens
        return lambda: DraftModel(draft, capacity=capacity, token_cost=token_cost)

    def _draft_runtime(self, path: Path) -> Runtime:
        """Open the draft model at ``path``, once.

        Raises:
            InputError: it is damaged, or has another tokenizer.
        """
        with self._opening:
            if path not in self._drafts:
                bundle = Bundle(path)
                if self.options.check:
                    bundle.check_files()
                own = bundle_tokenizer(bundle)
                if self.tokenizer and own and not own.has_tokens_of(self.tokenizer):
                    raise InputError(
                        f"the draft model in {path} has another tokenizer than the model; give "
                        "one of the same family"
                    )
                self._drafts[path] = open_runtime(
                    bundle,
                    sliding_window_cache=False,  # wrong drafts are cut off as far back as they go
                    **self._how_to_open(),
                )
            return self._drafts[path]


class Chat:
    """A conversation. Each turn computes only the tokens that are new to its cache.

    One turn runs at a time; separate conversations of one model may run in separate threads.

    Args:
        model: answers.
        system: a system message.
        options: for every turn; a turn may change them.

    Raises:
        InputError: the bundle's tokenizer has neither a chat template nor Gemma's turn tokens, or
            ``system`` is not a text.
    """

    def __init__(
        self, model: Model, system: str | None = None, options: GenerateOptions | None = None
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"a conversation needs a Model, not {model!r:.60}; load one")
        if model.tokenizer is None or not model.tokenizer.chat.exists:
            raise InputError(
                f"{model.bundle.path} has no tokenizer with a chat template or Gemma's turn "
                "tokens, so it cannot hold a conversation; use generate, or an instruction model's "
                "tokenizer"
            )
        self.model = model
        if system is not None and not isinstance(system, str):
            raise InputError(f"system is {system!r:.60}; it must be a text")
        self.options = merged(GenerateOptions, options, {})
        self.messages: list[ChatMessage] = []
        if system is not None:
            self.messages.append(ChatMessage(role="system", content=system))
        self._kept: KeptCache | None = None
        self._turn: weakref.ref[TextStream] | None = None  # the turn that runs, if any
        self._starting = threading.Lock()

    def send(self, text: str, **changes: Any) -> Completion:
        """Send a message and return the model's answer.

        Args:
            text: the user's message.
            changes: fields of :class:`GenerateOptions`, for this turn.

        Raises:
            InputError: the conversation no longer fits the model's context, an option is out of
                range, or another turn is running; the message is then not part of the conversation.
        """
        stream = self.stream(text, **changes)
        for _ in stream:
            pass
        return stream.completion

    def stream(self, text: str, **changes: Any) -> TextStream:
        """Send a message and yield the answer's text as it is generated.

        The message and its answer become part of the conversation when the stream ends or is
        closed, and not if it fails or is discarded.

        Raises:
            InputError: as :meth:`send`.
        """
        with self._starting:
            if self._turn is not None and self._turn() is not None:
                raise InputError(
                    "another turn of this conversation is running; read its stream to the end or "
                    "close it, and give each thread a chat of its own"
                )
            messages = [*self.messages, ChatMessage(role="user", content=text)]
            generation = self.model.start(
                [messages],
                merged(GenerateOptions, self.options, changes),
                kept_cache=self._cache,
            )
            stream = TextStream(generation, on_end=self._append_to(messages))
            self._turn = weakref.ref(stream)
            return stream

    def _append_to(self, messages: list[ChatMessage]) -> Callable[[Completion | None], None]:
        def append(completion: Completion | None) -> None:
            if completion is not None:
                answer = ChatMessage(role="assistant", content=completion.text)
                self.messages = [*messages, answer]
            self._turn = None

        return append

    def _cache(self, runtime: Runtime) -> KeptCache:
        if self._kept is None or not self._kept.belongs_to(runtime):
            self._kept = KeptCache(runtime, capacity=CHAT_CAPACITY)
        return self._kept


def is_conversation(prompt: object) -> TypeGuard[Sequence[ChatMessage]]:
    """Return whether ``prompt`` is a list of chat messages."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    return is_list and bool(prompt) and isinstance(prompt[0], Mapping)  # type: ignore[index]


def is_one_prompt(prompt: object) -> bool:
    """Return whether ``prompt`` is a text, token ids or a conversation, and not a list of these.

    Raises:
        InputError: it is none of them.
    """
    if isinstance(prompt, str):
        return True
    if not len(require_prompt(prompt)):
        raise InputError("the prompt is empty; give some text, or at least one token id")
    return isinstance(prompt[0], Integral | Mapping)  # type: ignore[index]


def require_prompt(prompt: object) -> Sequence[Any] | NDArray[Any]:
    """Return ``prompt`` if it can hold token ids, messages or prompts.

    Raises:
        InputError: it cannot; bytes, for instance, would pass for token ids.
    """
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, BINARY)
    if not is_list and not (isinstance(prompt, np.ndarray) and prompt.ndim):
        raise InputError(
            f"a prompt is a text, a list of token ids or a list of messages, not "
            f"{type(prompt).__name__}"
        )
    return prompt  # type: ignore[return-value]


def checked_token_ids(prompt: object) -> list[int]:
    """Return a prompt of token ids as a list of integers.

    Raises:
        InputError: it holds something else, even if that could be made an integer.
    """
    ids = list(require_prompt(prompt))
    for token_id in ids:
        if not isinstance(token_id, Integral) or isinstance(token_id, bool):
            raise InputError(
                f"a list of token ids holds {token_id!r:.60}, which is not an integer; to continue "
                "several prompts, give a list of texts, or a list of lists of token ids"
            )
    return list(map(int, ids))


def bundle_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """Return the tokenizer of ``bundle``, checked against its model, or None.

    Raises:
        InputError: it is damaged, or belongs to another model.
    """
    path = bundle.file("tokenizer.json")
    if not path.is_file():
        return None
    tokenizer = Tokenizer.from_file(path)
    tokenizer.check_vocab_size(bundle.config.vocab_size)
    return tokenizer


def evicts(runtime: Runtime) -> bool:
    """Return whether the runtime's caches let go of tokens outside the sliding window."""
    return isinstance(runtime, CacheVariants) and runtime.uses_sliding_window_cache


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest prefix that two of the prompts share."""
    longest = 0
    for one, other in pairwise(sorted(map(list, prompts))):  # neighbors share the most
        ends = min(len(one), len(other))
        same = next((at for at in range(ends) if one[at] != other[at]), ends)
        longest = max(longest, same)
    return longest
