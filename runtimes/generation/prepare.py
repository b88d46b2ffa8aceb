"""Check prompts and limits, and make the requests that the generation loop takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.limits import PREFILL_CHUNK
from gemma3_export.runtimes.generation.candidates import SelectsCandidates, candidates_needed
from gemma3_export.runtimes.generation.request import (
    RequestState,
    StreamingDecoder,
    TokenConstraint,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.scheduler import ScheduledRequest
from gemma3_export.runtimes.generation.speculation import (
    CANDIDATE_COSTS,
    MAX_DRAFT_TOKENS,
    PLAIN_COSTS,
    Drafter,
    Speculation,
    StepCosts,
)
from gemma3_export.runtimes.protocol import CacheVariants, IntArray, Runtime

__all__ = ["GenerationOptions", "check_prompts", "choose_capacity", "prepare_request"]

LOGPROBS_CHUNK = 64  # prompt tokens per step whose logits are all needed: 64 MB of Gemma's


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """Limits of a generation, the same for all of its prompts.

    Args:
        max_new_tokens: the most tokens to generate per prompt. Generation also ends, with the
            finish reason ``length``, where the cache or the model's context is full.
        stop_token_ids: tokens that end a prompt's generation; None is the config's
            ``eos_token_id``, empty is none.
        stop_texts: texts that end a prompt's generation; they need a tokenizer.
        prefill_chunk: prompt tokens to process per step.
        idle_prefill_chunk: the same while no answer waits for the step; None is as many.
        capacity: tokens of prompt and answer that a row of the cache holds; None is what the
            longest prompt needs, within the model's context.
        max_draft_tokens: the most tokens to draft at once; sliding-window caches, which cannot
            take back more, draft less than a window.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...] | None = None
    stop_texts: tuple[str, ...] = ()
    prefill_chunk: int = PREFILL_CHUNK
    idle_prefill_chunk: int | None = None
    capacity: int | None = None
    max_draft_tokens: int = MAX_DRAFT_TOKENS

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_chunk", "max_draft_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if isinstance(self.stop_texts, str) or not all(self.stop_texts):
            raise InputError(
                f"stop_texts is {self.stop_texts!r}; give a list of texts that are not empty"
            )


def prepare_request(
    runtime: Runtime,
    index: int,
    prompt_ids: IntArray,
    params: SamplingParams,
    options: GenerationOptions,
    capacity: int,
    *,
    detokenize: Callable[[], StreamingDecoder] | None = None,
    constraint: Callable[[], TokenConstraint] | None = None,
    drafter: Callable[[], Drafter] | None = None,
) -> ScheduledRequest:
    """Return a request for the loop.

    Args:
        runtime: the backend that will run it.
        index: identifies the request in its events.
        prompt_ids: [T] a prompt that :func:`check_prompts` accepted.
        params: how to sample.
        options: limits and stop conditions.
        capacity: tokens that a row of the cache can hold, at least as many as the prompt has.
        detokenize: makes its decoder; None leaves its text empty.
        constraint: makes its constraint; None allows every token.
        drafter: makes its drafter; None drafts nothing.

    Raises:
        InputError: there are stop texts, and nothing to decode the tokens with; or a bias is on a
            token that the vocabulary does not have.
    """
    if options.stop_texts and detokenize is None:
        raise InputError("stop_texts need a tokenizer to see the text; give detokenize")
    vocab_size = runtime.config.vocab_size
    if (biased := max(params.logit_bias or {}, default=0)) >= vocab_size:
        raise InputError(
            f"logit_bias has token id {biased}, outside the model's vocabulary of {vocab_size}"
        )
    stop_token_ids = options.stop_token_ids
    state = RequestState(
        index,
        prompt_ids,
        params,
        # the last one is never fed
        max_new_tokens=min(options.max_new_tokens, capacity - prompt_ids.size + 1),
        stop_token_ids=runtime.config.eos_token_id if stop_token_ids is None else stop_token_ids,
        stop_texts=options.stop_texts,
        decoder=detokenize() if detokenize else None,
        constraint=constraint() if constraint else None,
    )
    speculation = None
    longest = _longest_draft(runtime, options.max_draft_tokens)
    if drafter and longest:
        speculation = Speculation(state, drafter(), longest, _step_costs(runtime, state))
    chunk, idle = options.prefill_chunk, options.idle_prefill_chunk
    if params.prompt_logprobs is not None:
        chunk, idle = min(chunk, LOGPROBS_CHUNK), None
    idle = max(chunk, idle // chunk * chunk) if idle else chunk
    return ScheduledRequest(
        state=state, prefill_chunk=chunk, idle_chunk=idle, speculation=speculation
    )


def check_prompts(
    prompts: Sequence[Sequence[int] | IntArray], config: Gemma3Config
) -> list[IntArray]:
    """Return each prompt as [T] int64.

    Raises:
        InputError: there is none, or one is empty, or not of token ids of the vocabulary.
    """
    if not len(prompts):
        raise InputError("there is no prompt; give at least one")
    checked = []
    for number, prompt in enumerate(prompts, 1):  # numbered from 1 for people
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise InputError(f"prompt {number} is empty; give at least one token, such as <bos>")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                f"prompt {number} has shape {ids.shape} and type {ids.dtype}; "
                "each prompt must be a sequence of token ids"
            )
        bad = ids[(ids < 0) | (ids >= config.vocab_size)]
        if bad.size:
            raise InputError(
                f"prompt {number} holds token id {bad[0]}, outside the model's vocabulary of "
                f"{config.vocab_size}; was it encoded with another model's tokenizer?"
            )
        checked.append(ids.astype(np.int64))
    return checked


def choose_capacity(
    prompt_ids: Sequence[IntArray], options: GenerationOptions, config: Gemma3Config
) -> int:
    """Return the tokens that each row of a cache for the prompts must hold.

    Raises:
        InputError: a prompt does not fit, or ``options.capacity`` exceeds the model's context.
    """
    capacity = options.capacity
    limit = config.max_position_embeddings
    if capacity is not None and not 1 <= capacity <= limit:
        raise InputError(f"capacity is {capacity}; it must be from 1 to the model's {limit} tokens")
    lengths = [ids.size for ids in prompt_ids]
    longest = max(lengths)
    if longest > (capacity or limit):
        what = "the model's context" if capacity is None else "the cache's capacity"
        raise InputError(
            f"prompt {lengths.index(longest) + 1} has {longest} tokens, more than {what} of "
            f"{capacity or limit}; shorten the prompt"
        )
    return capacity or min(longest + options.max_new_tokens, limit)


def _longest_draft(runtime: Runtime, max_draft_tokens: int) -> int:
    """Return the longest draft that can be cut off again: with the token before it, one window."""
    if isinstance(runtime, CacheVariants) and runtime.uses_sliding_window_cache:
        return min(max_draft_tokens, runtime.config.sliding_window - 1)
    return max_draft_tokens


def _step_costs(runtime: Runtime, request: RequestState) -> StepCosts:
    """Return the costs of verifying drafts, which depend on whether plain steps use candidates."""
    chooses = isinstance(runtime, SelectsCandidates) and runtime.selects_candidates
    if request.needs_all_logits or candidates_needed(request.params) is None:
        return PLAIN_COSTS
    return CANDIDATE_COSTS if chooses else PLAIN_COSTS
