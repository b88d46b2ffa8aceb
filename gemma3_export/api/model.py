"""Load a bundle and generate text with it.

    import gemma3_export

    model = gemma3_export.load("gemma-3-270m")
    print(model.generate("The sea is", max_new_tokens=64).text)

Python and the command line generate through the same :class:`Model`. It encodes prompts and decides
which tokens end a generation; :mod:`gemma3_export.api.model_runtimes` decides on caches and drafts.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from gemma3_export.api.model_files import Weights, choose_runtime, open_files, tokenizer_of
from gemma3_export.api.model_runtimes import ModelRuntimes
from gemma3_export.api.options import GenerateOptions, LoadOptions, merged
from gemma3_export.api.prompts import (
    Prompt,
    checked_token_ids,
    is_conversation,
    is_one_prompt,
    resolve_stops,
)
from gemma3_export.api.stream import TextStream
from gemma3_export.bundle import Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.limits import PREFILL_CHUNK
from gemma3_export.runtimes.generation.generate import Cancel, Generation
from gemma3_export.runtimes.generation.generate import generate as start_generation
from gemma3_export.runtimes.generation.kept_cache import KeptCache
from gemma3_export.runtimes.generation.loop import GenerationLoop
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.prepare import (
    GenerationOptions,
    check_prompts,
    choose_capacity,
    prepare_request,
)
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.scheduler import ScheduledRequest
from gemma3_export.runtimes.generation.speculation import MAX_DRAFT_TOKENS
from gemma3_export.runtimes.protocol import IntArray, Logits, Runtime
from gemma3_export.runtimes.structured.constraint import ConstraintFactory, GrammarConstraint
from gemma3_export.runtimes.structured.function_calls import CallTokens, function_call_grammar
from gemma3_export.tokenizer import ChatMessage, FunctionCall, StreamingDecoder

__all__ = ["Chat", "Model", "load"]

CHAT_CAPACITY = 4096  # tokens that a conversation starts with room for; it doubles as needed


def load(
    path: Path | str | Bundle | Weights, options: LoadOptions | None = None, **changes: Any
) -> Model:
    """Load a bundle, or weights without an export, ready to generate.

    Args:
        path: the folder of an exported bundle; or a trained run, a Hugging Face folder, a GGUF or a
            PyTorch file, which run on the reference.
        options: which runtime to open, and on which device.
        changes: fields of :class:`LoadOptions`, such as ``device="cpu"``.

    Raises:
        InputError: there is neither a bundle nor weights, or they are damaged, or have no such
            graph.
        UnavailableError: a package or the device is missing.
    """
    model = Model(path, options, **changes)
    model.open()
    return model


class Model:
    """A bundle, or weights, that generate text; safe to share between threads.

    Constructing it reads the manifest, config and tokenizer. The runtime opens with
    :meth:`open`, or with the first generation, which then picks the caches that suit its prompts.

    Args:
        path: the folder of an exported bundle, or weights, as for :func:`load`.
        options: which runtime to open, and on which device.
        changes: fields of :class:`LoadOptions`.

    Raises:
        InputError: there is neither a bundle nor weights, the tokenizer is not the model's, or
            ``check`` finds a file that was changed.
    """

    def __init__(
        self,
        path: Path | str | Bundle | Weights,
        options: LoadOptions | None = None,
        **changes: Any,
    ) -> None:
        options = merged(LoadOptions, options, changes)
        self._files = open_files(path, options.variant)
        self.options = replace(options, runtime=choose_runtime(self._files, options.runtime))
        if self.options.check:
            self._files.check_files()
        self.tokenizer = tokenizer_of(self._files)
        self._runtimes = ModelRuntimes(self._files, self.tokenizer, self.options)
        self._constraints = (
            None
            if self.tokenizer is None
            else ConstraintFactory(self.tokenizer, self.config.vocab_size)
        )

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, runtime={self.options.runtime!r})"

    @property
    def path(self) -> Path:
        """The folder of the bundle, or the folder or file of the weights."""
        return self._files.path

    @property
    def bundle(self) -> Bundle:
        """The bundle.

        Raises:
            InputError: the model was loaded from weights.
        """
        if isinstance(self._files, Weights):
            raise InputError(f"{self.path} is not a bundle; export it first")
        return self._files

    @property
    def variant(self) -> str | None:
        """The bundle's variant that runs, such as ``int8``; None for weights."""
        if isinstance(self._files, Weights):
            return None
        runtime = self.options.runtime
        has_graph = runtime in self._files.runtimes  # the reference takes the weights of any graph
        return (self._files.graph(runtime) if has_graph else self._files.first_graph).variant

    @property
    def config(self) -> Gemma3Config:
        """The model's shapes and constants."""
        return self._files.config

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
        return self._runtimes.open()

    def close(self) -> None:
        """Release the runtime and its memory; the next generation opens it again."""
        self._runtimes.close()

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
        starts = range(0, ids.size, PREFILL_CHUNK)
        chunks = [ids[None, start : start + PREFILL_CHUNK] for start in starts]
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
        token_ids = [self.encode(prompt, options) for prompt in prompts]
        limits = self._limits(prompts, options)
        constraint = self._constraint(options, limits.stop_token_ids or ())
        runtime = self._runtimes.open_for(token_ids, options)
        return start_generation(
            runtime,
            token_ids,
            options.sampling(),
            self._with_drafts(limits, runtime, options),
            detokenize=self._decoders(options),
            constraint=constraint,
            drafter=self._runtimes.drafter(runtime, token_ids, options),
            prefix_cache=self._runtimes.prefix_cache(runtime, token_ids, options),
            kept_cache=kept_cache(runtime) if callable(kept_cache) else kept_cache,
            cancel=cancel,
        )

    def prepare(
        self,
        prompt: Prompt,
        options: GenerateOptions,
        runtime: Runtime,
        *,
        index: int,
        capacity: int,
        seed: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> ScheduledRequest:
        """Return a request for a generation loop that others share.

        Args:
            prompt: a text, token ids or a conversation.
            options: how to sample, when to stop, and so on.
            runtime: the runtime of the loop, one of this model.
            index: identifies the request in its events.
            capacity: tokens that a row of the loop's cache can hold.
            seed: sample as if the prompt were alone, with this seed; None uses that of the options.
            prefill_chunk: prompt tokens of a step, unless the options say.

        Raises:
            InputError: as :meth:`generate`.
        """
        token_ids = self.encode(prompt, options, most=capacity)
        limits = replace(
            self._limits([prompt], options),
            capacity=capacity,
            prefill_chunk=options.prefill_chunk or prefill_chunk,
            idle_prefill_chunk=options.own_prefill_chunk,
        )
        (prompt_ids,) = check_prompts([token_ids], self.config)
        choose_capacity([prompt_ids], limits, self.config)
        constraint = self._constraint(options, limits.stop_token_ids or ())
        params = options.sampling()
        return prepare_request(
            runtime,
            index,
            prompt_ids,
            params if seed is None else replace(params, seed=seed, request_index=0),
            self._with_drafts(limits, runtime, options),
            capacity,
            detokenize=self._decoders(options),
            constraint=constraint,
            drafter=self._runtimes.drafter(runtime, [token_ids], options),
        )

    def new_loop(
        self, samples: Sequence[list[int]], options: GenerateOptions, *, rows: int, row_tokens: int
    ) -> GenerationLoop:
        """Return a loop for requests that are prepared one after the other.

        Args:
            samples: the token ids of some prompts; if they share a prefix, so may the requests.
            options: of all requests.
            rows: requests that run at once.
            row_tokens: tokens of prompt and answer that one can hold.

        Raises:
            InputError: ``row_tokens`` exceeds the model's context; or as :meth:`open`.
        """
        runtime = self._runtimes.open_for(samples, options)
        return GenerationLoop(
            runtime,
            runtime.new_cache(rows, row_tokens),
            prefix_cache=self._runtimes.prefix_cache(runtime, samples, options),
        )

    def kept_prefixes(self, runtime: Runtime) -> PrefixCache | None:
        """Return the prompt prefixes of ``runtime`` that are kept between calls, if any are."""
        return self._runtimes.kept_prefixes(runtime)

    def encode(
        self, prompt: Prompt, options: GenerateOptions | None = None, *, most: int | None = None
    ) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            prompt: a text, token ids, or the messages of a conversation.
            options: whether a text may spell control tokens, and what goes into a chat template.
            most: number of tokens above which a text is useless; one that is certainly longer is
                not encoded, which would take long.

        Raises:
            InputError: it is no prompt, the bundle has no tokenizer for it, or it cannot be
                encoded.
            TextTooLongError: its length alone shows that it has more than ``most`` tokens.
        """
        if not isinstance(prompt, str) and not is_conversation(prompt):
            return checked_token_ids(prompt)
        if self.tokenizer is None:
            raise InputError(
                f"{self.path} has no tokenizer, so it takes no text; give token ids, or "
                "export it again with a tokenizer"
            )
        options = options or GenerateOptions()
        if isinstance(prompt, str):
            return self.tokenizer.encode(
                prompt, allow_control_tokens=options.allow_control_tokens, most=most
            )
        return self.tokenizer.encode_chat(prompt, options.chat(), most=most)

    def stop_token_ids(self, *, is_chat: bool) -> tuple[int, ...]:
        """Return the tokens that end a generation.

        A conversation also ends where the chat template ends the model's turn, which the configs
        of base models do not say.
        """
        ends = self.tokenizer.chat.end_token_ids if is_chat and self.tokenizer else ()
        return tuple(dict.fromkeys((*self.config.eos_token_id, *ends)))

    def _constraint(
        self, options: GenerateOptions, stop_token_ids: Sequence[int]
    ) -> Callable[[], GrammarConstraint] | None:
        """Return a factory of constraints, one per prompt; None if any text may be generated.

        Raises:
            InputError: there is no tokenizer; or it is not FunctionGemma's, and functions are to be
                called.
        """
        grammar = options.grammar
        if grammar is None and options.tool_choice is None:
            return None
        if self.tokenizer is None or self._constraints is None:
            what = "tool_choice" if grammar is None else grammar.option
            raise InputError(
                f"{self.path} has no tokenizer, so {what} cannot be enforced; export it again with "
                "a tokenizer"
            )
        if grammar is None:
            assert options.tool_choice is not None
            tokens = CallTokens(*self.tokenizer.chat.call_token_ids())
            grammar = function_call_grammar(options.tools, options.tool_choice, tokens)
        constraints = self._constraints
        return lambda: constraints.new(grammar, stop_token_ids)

    def _limits(self, prompts: Sequence[Prompt], options: GenerateOptions) -> GenerationOptions:
        """Return limits and stops of a generation of ``prompts``."""
        stop_token_ids, stop_texts = self._stops(prompts, options)
        return GenerationOptions(
            max_new_tokens=options.max_new_tokens,
            stop_token_ids=stop_token_ids,
            stop_texts=stop_texts,
            prefill_chunk=options.own_prefill_chunk,
        )

    def _with_drafts(
        self, limits: GenerationOptions, runtime: Runtime, options: GenerateOptions
    ) -> GenerationOptions:
        draft_tokens = self._runtimes.draft_tokens(runtime, options)
        return replace(limits, max_draft_tokens=draft_tokens or MAX_DRAFT_TOKENS)

    def _decoders(self, options: GenerateOptions) -> Callable[[], StreamingDecoder] | None:
        """Return what makes the decoder of each prompt; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return partial(
            StreamingDecoder, self.tokenizer, skip_special_tokens=not options.show_special_tokens
        )

    def _stops(
        self, prompts: Sequence[Prompt], options: GenerateOptions
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the tokens and the texts that end a generation of ``prompts``.

        Raises:
            InputError: some prompts are conversations, which end with another token than the rest;
                or a stop token does not exist, or a text can never occur.
        """
        kinds = {self.stop_token_ids(is_chat=is_conversation(prompt)) for prompt in prompts}
        if len(kinds) > 1:
            raise InputError(
                "conversations end with other tokens than the rest of the prompts; generate them "
                "in two calls"
            )
        ends = kinds.pop() if kinds and not options.ignore_eos else ()
        tokens, texts = resolve_stops(options, self.tokenizer, self.config.vocab_size)
        return tuple(dict.fromkeys((*ends, *tokens))), texts


class Chat:
    """A conversation. Each turn computes only the tokens that are new to its cache.

    One turn runs at a time; separate conversations of one model may run in separate threads.

    Attributes:
        messages: the conversation so far.

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
                f"{model.path} has no tokenizer with a chat template or Gemma's turn "
                "tokens, so it cannot hold a conversation; use generate, or an instruction model's "
                "tokenizer"
            )
        self.model = model
        if system is not None and not isinstance(system, str):
            raise InputError(f"system is {system!r:.60}; it must be a text")
        self.options = merged(GenerateOptions, options, {})
        self._format = model.tokenizer.chat
        self._opening = self._format.opening(system, self.options.tools)
        self.messages: list[ChatMessage] = [*self._opening]
        self._last: Completion | None = None
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

    def stream(self, text: str, *, cancel: Cancel | None = None, **changes: Any) -> TextStream:
        """Send a message and yield the answer's text as it is generated.

        The message and its answer become part of the conversation when the stream ends or is
        closed, and not if it fails or is discarded.

        Args:
            text: the user's message.
            cancel: an event or a function, checked before every step; the answer ends there.
            changes: fields of :class:`GenerateOptions`, for this turn.

        Raises:
            InputError: as :meth:`send`.
        """
        return self._start([ChatMessage(role="user", content=text)], changes, cancel)

    def reset(self) -> None:
        """Forget the conversation except for its system message, whose cache is kept.

        Raises:
            InputError: a turn is running.
        """
        with self._starting:
            self._refuse_if_running()
            self.messages, self._last = [*self._opening], None

    @property
    def calls(self) -> list[FunctionCall]:
        """The function calls of the last answer, to be answered with :meth:`respond`.

        Raises:
            InputError: a call is malformed or incomplete; or the conversation has tools, but
                another format of calls than FunctionGemma's.
        """
        if self._last is None or not (self._format.calls_functions or self.options.tools):
            return []
        return self._format.read_answer(self._last.token_ids)[1]

    def respond(self, *results: object, **changes: Any) -> Completion:
        """Give the results of the functions that the last answer calls; return the next answer.

        Args:
            results: one for each of ``calls``, in the same order: a text, a number, or a mapping.
            changes: fields of :class:`GenerateOptions`, for this turn.

        Raises:
            InputError: there are more or fewer calls than results; or as :meth:`send`.
        """
        calls = self.calls
        if len(results) != len(calls):
            raise InputError(
                f"the last answer calls {len(calls)} functions, and there are {len(results)} "
                "results; give one for each call"
            )
        if not results:
            raise InputError("the last answer calls no function; send a message instead")
        messages = [
            ChatMessage(role="tool", name=call.name, content=result)  # type: ignore[typeddict-item]
            for call, result in zip(calls, results, strict=True)
        ]
        stream = self._start(messages, changes)
        for _ in stream:
            pass
        return stream.completion

    def _refuse_if_running(self) -> None:
        if self._turn is not None and self._turn() is not None:
            raise InputError(
                "another turn of this conversation is running; read its stream to the end or "
                "close it, and give each thread a chat of its own"
            )

    def _start(
        self, new: list[ChatMessage], changes: dict[str, Any], cancel: Cancel | None = None
    ) -> TextStream:
        with self._starting:
            self._refuse_if_running()
            messages = [*self.messages, *new]
            generation = self.model.start(
                [messages],
                merged(GenerateOptions, self.options, changes),
                cancel=cancel,
                kept_cache=self._cache,
            )
            stream = TextStream(generation, on_end=self._append_to(messages))
            self._turn = weakref.ref(stream)
            return stream

    def _append_to(self, messages: list[ChatMessage]) -> Callable[[Completion | None], None]:
        def append(completion: Completion | None) -> None:
            if completion is not None:
                self.messages = [*messages, self._answer(completion)]
                self._last = completion
            self._turn = None

        return append

    def _answer(self, completion: Completion) -> ChatMessage:
        """Return an answer as a message; calls that are malformed stay text."""
        try:
            text, calls = self._format.read_answer(completion.token_ids)
        except InputError:
            calls = []
        if not calls:
            return ChatMessage(role="assistant", content=completion.text)
        message = ChatMessage(role="assistant", tool_calls=[call.to_message() for call in calls])
        if text.strip():
            message["content"] = text
        return message

    def _cache(self, runtime: Runtime) -> KeptCache:
        if self._kept is None or not self._kept.belongs_to(runtime):
            self._kept = KeptCache(runtime, capacity=CHAT_CAPACITY)
        return self._kept
