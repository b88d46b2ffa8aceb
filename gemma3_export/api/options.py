"""Options of loading and generating, as dataclasses that keyword arguments can change."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from gemma3_export.api.checks import (
    check_cuda,
    check_flags,
    check_integers,
    check_json,
    check_paths,
    check_texts,
)
from gemma3_export.device import CudaOptions
from gemma3_export.errors import InputError
from gemma3_export.limits import (
    MAX_SIZE_BYTES,
    PREFILL_CHUNK,
    check_threads,
    is_number,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.structured.function_calls import check_tool_choice
from gemma3_export.runtimes.structured.grammar import Grammar
from gemma3_export.tokenizer.chat_format import ChatOptions

__all__ = [
    "GenerateOptions",
    "LoadOptions",
    "merged",
]

PREFIX_CACHE_BYTES = 256_000_000
Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """Options of :func:`gemma3_export.load`: the runtime, the device, the caches.

    Args:
        runtime: ``onnx``, ``torchscript``, ``pt2`` or ``reference``; ``auto`` is ``onnx`` if the
            bundle has it, otherwise its only graph, and the reference for weights.
        variant: which graph to run if the runtime has several, such as ``int8``; None is the one in
            ``model.onnx``, otherwise the one that was exported first.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads; None lets the backend choose.
        cuda: what may be done on a GPU; ignored on the CPU.
        trust: load a torch archive although it is not the one that was exported.
        check: hash every file of the bundle before using it; otherwise, of files above 32 MiB, only
            the size and a sample are compared.
        warm_up: run a few steps when the runtime opens, so that the first prompt does not wait for
            kernels to load and memory to be allocated.
        sliding_window_cache: whether sliding layers cache only their window; None is whatever
            suits the prompts. Generation opens the runtime again, once, where prompts share a
            prefix that such caches could not copy.
        shares_weights: share an fp32 bundle's weights between all processes that run it on the CPU.
        huge_pages: move the weights into huge pages once they are loaded, on the CPU under Linux.
            Decoding is faster then, but loading takes 1.2 to 3 times as long. A system that cannot
            do it ignores this.
        kept_prefix_bytes: memory for prompt prefixes that are kept between calls; 0 keeps none.
    """

    runtime: str = "auto"
    variant: str | None = None
    device: str = "auto"
    threads: int | None = None
    cuda: CudaOptions | None = None
    trust: bool = False
    check: bool = False
    warm_up: bool = False
    sliding_window_cache: bool | None = None
    shares_weights: bool = False
    huge_pages: bool = False
    kept_prefix_bytes: int = 0

    def __post_init__(self) -> None:
        check_texts(self, "runtime", "device", "variant")
        check_threads(self.threads)
        check_integers(self, 0, "kept_prefix_bytes", most=MAX_SIZE_BYTES)
        check_flags(self, "trust", "check", "warm_up", "sliding_window_cache", "shares_weights")
        check_flags(self, "huge_pages")
        check_cuda(self)
        if self.kept_prefix_bytes and self.sliding_window_cache:
            raise InputError(
                "kept_prefix_bytes needs caches that hold every token; leave "
                "sliding_window_cache out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(SamplingParams):
    """Options of a generation, including every sampling parameter. The defaults are greedy.

    Args:
        max_new_tokens: maximum number of tokens to generate per prompt.
        stop: texts that end a generation; they are cut off the result. A text that is exactly one
            control token, such as ``<end_of_turn>``, stops at that token.
        stop_tokens: ids or names of further tokens that end a generation.
        ignore_eos: generate past the tokens that end a text or a turn, as load tests need.
        prompt_lookup: maximum number of tokens to draft by looking up what followed the same words;
            0 is off, None is 16 on the CPU and off for quantized bundles and on CUDA.
        draft_model: a smaller bundle that drafts tokens instead.
        prefix_cache_bytes: memory for prefixes that the prompts of one call share; 0 is off.
        prefill_chunk: prompt tokens to compute per step; None is 512, or what the engine is set to.
        allow_control_tokens: recognize control tokens that a text prompt spells. Set it to False
            for text from others, which could otherwise end its turn or begin another. Messages of
            a conversation never contain control tokens.
        show_special_tokens: keep special tokens in the text of the result.
        tools: JSON schemas of the functions that the model may call, for conversations.
        documents: documents with a title and a text, for conversations.
        chat_template: the name of one of the tokenizer's chat templates; None is the default one.
        template_variables: other variables of the chat template, such as ``enable_thinking``.
        json_schema: generate JSON that validates against this schema: a mapping, or JSON text. The
            text ends where the JSON does; ``is_complete`` of the result says whether it got there.
        regex: generate a text that this regular expression matches as a whole.
        tool_choice: constrain calls to the schemas of ``tools``, for FunctionGemma: ``auto`` is
            text or calls, ``required`` at least one call, ``none`` only text, and the name of a
            function one call of it. None leaves the answer to the model, unchecked.

    Raises:
        InputError: a value is out of range; or a schema or regular expression cannot be enforced.
        UnavailableError: there is one, and llguidance is not installed.
    """

    max_new_tokens: int = 128
    stop: str | tuple[str, ...] = ()
    stop_tokens: int | str | tuple[int | str, ...] = ()
    ignore_eos: bool = False
    prompt_lookup: int | None = None
    draft_model: Path | str | None = None
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES
    prefill_chunk: int | None = None
    allow_control_tokens: bool = True
    show_special_tokens: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    template_variables: Mapping[str, Any] | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    tool_choice: str | None = None

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        check_flags(self, "ignore_eos", "allow_control_tokens", "show_special_tokens")
        check_texts(self, "chat_template", "tool_choice")
        check_json(self, "tools", "documents", is_list=True)
        check_json(self, "template_variables")
        check_integers(self, 1, "max_new_tokens", "prefill_chunk")
        check_integers(self, 0, "prompt_lookup")
        check_integers(self, 0, "prefix_cache_bytes", most=MAX_SIZE_BYTES)
        check_paths(self, "draft_model")
        if not isinstance(self.stop, str):
            if not isinstance(self.stop, Sequence | Set) or not all(
                isinstance(text, str) for text in self.stop
            ):
                raise InputError(f"stop is {self.stop!r:.60}; it must be a text or a list of texts")
            object.__setattr__(self, "stop", tuple(self.stop))
        tokens = self.stop_tokens
        tokens = (tokens,) if isinstance(tokens, str | Integral) else tokens
        if not isinstance(tokens, Sequence | Set) or not all(
            isinstance(token, str) or is_number(token, Integral) for token in tokens
        ):
            raise InputError(
                f"stop_tokens is {self.stop_tokens!r:.60}; it must be ids or names of tokens"
            )
        object.__setattr__(self, "stop_tokens", tuple(tokens))
        self._check_grammar()

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def own_prefill_chunk(self) -> int:
        """Prompt tokens to compute per step, outside an engine."""
        return self.prefill_chunk or PREFILL_CHUNK

    @property
    def stop_token_names(self) -> tuple[int | str, ...]:
        """The stop tokens as a tuple of ids and names."""
        tokens = self.stop_tokens
        return (tokens,) if isinstance(tokens, str | int) else tokens

    @property
    def grammar(self) -> Grammar | None:
        """What the text must match, None if anything goes."""
        if self.json_schema is not None:
            return Grammar.of_json_schema(self.json_schema)
        return None if self.regex is None else Grammar.of_regex(self.regex)

    def chat(self) -> ChatOptions:
        """Return what goes into a chat template besides the messages."""
        return ChatOptions(
            tools=self.tools,
            documents=self.documents,
            template=self.chat_template,
            variables=self.template_variables or {},
        )

    def _check_grammar(self) -> None:
        """Check that a grammar can be enforced, and that nothing else ends or changes the text."""
        if self.tool_choice is not None:
            check_tool_choice(self.tools, self.tool_choice)
            if self.stop_texts:
                raise InputError("stop would cut function calls off; leave stop or tool_choice out")
        if self.ignore_eos and (self.tool_choice is not None or self.grammar is not None):
            raise InputError(
                "a constrained text ends where its constraint does; leave ignore_eos out"
            )
        if (grammar := self.grammar) is None:
            return
        if self.json_schema is not None and self.regex is not None:
            raise InputError("json_schema and regex exclude each other; leave one of them out")
        if self.stop_texts:
            raise InputError(
                f"stop would cut the text off before it matches {grammar.option}; leave stop out"
            )
        if self.tools:
            raise InputError(f"{grammar.option} leaves no room for function calls; leave tools out")

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
        TypeError: ``options`` is not a ``kind``; or a change names no field of it, in which case
            the message suggests the nearest one.
        InputError: a value has the wrong type or is out of range.
    """
    if options is not None and not isinstance(options, kind):
        raise TypeError(
            f"options must be of type {kind.__name__}, and this is {options!r:.60}; give its "
            "fields as keyword arguments"
        )
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(known)}"
            raise TypeError(f"unknown option {name!r}; {hint}")
    return replace(kind() if options is None else options, **changes)  # type: ignore[type-var]
