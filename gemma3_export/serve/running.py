"""The choices of one request: submit them to the engine, follow them, cancel them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from gemma3_export.api.engine import Engine
from gemma3_export.api.engine_stream import EngineStream
from gemma3_export.api.options import GenerateOptions
from gemma3_export.errors import InputError, TextTooLongError
from gemma3_export.runtimes.generation.request import Completion, TokenEvent
from gemma3_export.serve.errors import ApiError, ClientGoneError
from gemma3_export.serve.requests import Asked
from gemma3_export.tokenizer import ChatMessage

__all__ = ["Choice", "RunningRequest", "warm_up_tokenizer", "with_tool_prompt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One choice, with its place in the answer."""

    index: int
    prompt_ids: Sequence[int]
    stream: EngineStream


class RunningRequest:
    """The choices of a request that the engine has accepted.

    Args:
        engine: computes them.
        asked: what the client wants.

    Raises:
        InputError: a prompt or an option is invalid.
        ApiError: a prompt is too long.
        QueueFullError: the engine has no room for all choices; none is left behind.
        EngineClosedError: the engine is closing.
    """

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self.asked = asked
        self.has_reader = True
        self.choices: list[Choice] = []
        prompts = [self._encoded(engine, prompt) for prompt in asked.prompts]
        options = replace(asked.options, stop_tokens=_stop_tokens(engine, asked))
        try:
            for prompt_ids in prompts:
                for number in range(asked.choices):
                    self.choices.append(
                        Choice(
                            index=len(self.choices),
                            prompt_ids=prompt_ids,
                            # the number tells choices apart that share a seed
                            stream=engine.stream(prompt_ids, options, request_index=number),
                        )
                    )
        except BaseException:
            self.cancel()
            raise

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; those of several choices count once."""
        return sum(len(choice.prompt_ids) for choice in self.choices[:: self.asked.choices])

    def cancel(self) -> None:
        """End all choices; safe to call at any time, from any thread."""
        for choice in self.choices:
            choice.stream.cancel()

    def give_up(self) -> None:
        """End all choices because the client has gone."""
        self.has_reader = False
        self.cancel()

    async def completions(self) -> list[Completion]:
        """Wait for all choices.

        Raises:
            Exception: one failed; the others are cancelled.
        """
        try:
            found = await asyncio.gather(*(choice.stream for choice in self.choices))
            for completion in found:
                self._require_end(completion)
            return found
        except BaseException:
            self.cancel()
            raise

    async def events(self) -> AsyncGenerator[tuple[Choice, TokenEvent | Completion], None]:
        """Yield tokens of all choices as they come, and the completion after each one's last.

        Raises:
            Exception: one failed; the others are cancelled.
        """
        queue: asyncio.Queue[tuple[Choice, TokenEvent | Completion | Exception]] = asyncio.Queue()

        async def follow(choice: Choice) -> None:
            try:
                async for event in choice.stream.events():
                    queue.put_nowait((choice, event))
                queue.put_nowait((choice, choice.stream.completion))
            except Exception as error:  # it belongs to whoever reads
                queue.put_nowait((choice, error))

        followers = [asyncio.create_task(follow(choice)) for choice in self.choices]
        try:
            left = len(followers)
            while left:
                choice, event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Completion):
                    self._require_end(event)
                    left -= 1
                yield choice, event
        finally:
            self.cancel()
            for follower in followers:
                follower.cancel()

    def _require_end(self, completion: Completion) -> None:
        """Check that a choice ended by itself.

        Raises:
            ClientGoneError: nobody waits for it.
            ApiError: the engine was closed.
        """
        if not self.has_reader:
            raise ClientGoneError
        if completion.finish_reason == "cancelled":
            raise ApiError(503, "the server has stopped before the answer was complete")

    def _encoded(self, engine: Engine, prompt: object) -> list[int]:
        """Return the ids of a prompt, once for all of its choices."""
        asked = self.asked
        limit = engine.max_request_tokens
        wanted = max(1, asked.max_tokens or 1)
        try:
            ids = engine.model.encode(prompt, asked.options, most=limit)  # type: ignore[arg-type]
            # the last token of an answer is never fed to the model
            size, is_too_long = f"{len(ids)}", len(ids) + wanted - 1 > limit
        except TextTooLongError as error:
            size, is_too_long = f"at least {error.least}", True
        if is_too_long:
            raise ApiError(
                400,
                f"the prompt has {size} tokens, and with {wanted} new ones that is more than "
                f"the {limit} of a request; shorten the prompt, or ask for fewer tokens",
                param="messages" if asked.is_chat else "prompt",
                code="context_length_exceeded",
            )
        return ids


def _stop_tokens(engine: Engine, asked: Asked) -> tuple[int | str, ...]:
    """Return the tokens that end an answer besides the model's own."""
    if not asked.is_chat or asked.options.ignore_eos:
        return ()
    return engine.model.stop_token_ids(is_chat=True)


def warm_up_tokenizer(engine: Engine) -> None:
    """Prepare what the first text and the first conversation would otherwise wait for."""
    model, limit = engine.model, engine.max_request_tokens
    if model.tokenizer is None:
        return
    for allows in (True, False):
        model.encode("a", GenerateOptions(allow_control_tokens=allows), most=limit)
    with suppress(InputError):  # a base model without a chat template, or one with rules of its own
        model.encode([ChatMessage(role="user", content="a")], most=limit)
    model.stop_token_ids(is_chat=True)


def with_tool_prompt(engine: Engine, asked: Asked) -> Asked:
    """Add the text that FunctionGemma needs before it calls functions, unless there is one."""
    tokenizer, tools = engine.model.tokenizer, asked.options.tools
    if tokenizer is None or not tools:
        return asked
    messages: list[ChatMessage] = list(asked.prompts[0])  # type: ignore[arg-type]
    if messages[0]["role"] in ("system", "developer"):
        return asked
    return replace(asked, prompts=[[*tokenizer.chat.opening(None, tools), *messages]])
