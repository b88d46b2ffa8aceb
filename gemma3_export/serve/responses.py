"""Answers as the OpenAI API writes them: choices, log-probabilities, usage and chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.request import Completion, TokenEvent
from gemma3_export.runtimes.generation.sampling import SampledToken
from gemma3_export.serve.running import Choice, RunningRequest
from gemma3_export.tokenizer import Tokenizer
from gemma3_export.tokenizer.function_calls import CALL_TOKENS, FunctionCall

__all__ = ["Writer"]

DONE = b"data: [DONE]\n\n"


class Writer:
    """Writes the answer to one request.

    Args:
        running: the request.
        model_name: what the answer says.
        tokenizer: of the model; None leaves texts empty.
    """

    def __init__(
        self, running: RunningRequest, model_name: str, tokenizer: Tokenizer | None
    ) -> None:
        self.running, self.asked = running, running.asked
        self._tokenizer = tokenizer
        prefix = "chatcmpl" if self.asked.is_chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model_name,
        }

    # --- whole answers --------------------------------------------------------------------------

    def answer(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        make = self._chat_choice if self.asked.is_chat else self._text_choice
        return {
            **self._head,
            "object": "chat.completion" if self.asked.is_chat else "text_completion",
            "choices": [
                make(choice, completion)
                for choice, completion in zip(self.running.choices, completions, strict=True)
            ],
            "usage": self.usage(completions),
        }

    def usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return how many tokens a request took."""
        prompt_tokens = self.running.prompt_tokens
        # a request for no tokens computes one, to get the log-probabilities of its prompt
        new_tokens = sum(len(each.tokens) for each in completions) if self._has_tokens else 0
        reused = sum(each.reused_tokens for each in completions[:: self.asked.choices])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    @property
    def _has_tokens(self) -> bool:
        return self.asked.max_tokens != 0

    def _text_choice(self, choice: Choice, completion: Completion) -> dict[str, Any]:
        text = completion.text if self._has_tokens else ""
        tokens = completion.tokens if self._has_tokens else ()
        logprobs = None
        if self.asked.reports_logprobs:
            prompt = self._prompt_logprobs(choice, completion) if self.asked.echo else ()
            logprobs = self._text_logprobs([*prompt, *tokens], 0)
        if self.asked.echo:
            text = self._prompt_text(choice) + text
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(completion) if self._has_tokens else "length",
        }

    def _chat_choice(self, choice: Choice, completion: Completion) -> dict[str, Any]:
        text, calls = self._read_answer(completion)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [_call_json(call) for call in calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._chat_logprobs(completion.tokens)
            if self.asked.reports_logprobs
            else None,
            "finish_reason": finish_reason(completion, calls),
        }

    def _prompt_logprobs(self, choice: Choice, completion: Completion) -> list[SampledToken]:
        """Return the tokens of the prompt; nothing precedes the first one."""
        first = SampledToken(token_id=int(choice.prompt_ids[0]))
        return [first, *completion.prompt_logprobs]

    def _prompt_text(self, choice: Choice) -> str:
        prompt = self.asked.prompts[choice.index // self.asked.choices]
        if isinstance(prompt, str):
            return prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(choice.prompt_ids)

    def _read_answer(self, completion: Completion) -> tuple[str, list[FunctionCall]]:
        """Return the text of an answer before its calls, and the calls.

        A call that was cut off is left out if others are complete. Malformed ones are text.
        """
        if self.asked.options.tools and self._tokenizer is not None:
            ids = completion.token_ids
            end_id = self._tokenizer.token_id(CALL_TOKENS[1])
            if completion.finish_reason != "stop" and end_id in ids:
                ids = ids[: len(ids) - ids[::-1].index(end_id)]
            try:
                text, calls = self._tokenizer.chat.read_answer(ids)
            except InputError:
                calls = []
            if calls:
                return text.strip(), calls[: self.asked.max_calls]
        return completion.text, []

    # --- log-probabilities ----------------------------------------------------------------------

    def _text_logprobs(self, tokens: Sequence[SampledToken], offset: int) -> dict[str, Any]:
        """Return log-probabilities as completions have them; ``offset`` is that of the text."""
        names = [self._name(token.token_id) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += self._text_length(token.token_id)
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _text_length(self, token_id: int) -> int:
        """Return how many characters a token adds to the text, in which specials are skipped."""
        return 0 if self._tokenizer is None else len(self._tokenizer.decode([token_id]))

    def _top(self, token: SampledToken) -> dict[str, float] | None:
        """Return the most likely tokens, and the chosen one if it is not among them."""
        if token.logprob is None:
            return None
        top = {self._name(each): value for each, value in token.top_logprobs}
        top.setdefault(self._name(token.token_id), token.logprob)
        return top

    def _chat_logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        """Return log-probabilities as chats have them."""
        return {
            "content": [
                {
                    **self._chat_token(token.token_id, token.logprob),
                    "top_logprobs": [self._chat_token(*pair) for pair in token.top_logprobs],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _chat_token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(data)}

    def _name(self, token_id: int) -> str:
        """Return the text of a token, which differs between tokens even if they are no text."""
        data = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    # --- streams --------------------------------------------------------------------------------

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as server-sent events.

        Raises:
            Exception: a choice failed.
        """
        chunks = self._chat_chunks() if self.asked.is_chat else self._text_chunks()
        async for chunk in chunks:
            yield chunk
        if self.asked.reports_usage:
            completions = [choice.stream.completion for choice in self.running.choices]
            yield self._chunk([], usage=self.usage(completions))
        yield DONE

    async def _text_chunks(self) -> AsyncGenerator[bytes, None]:
        offsets = [0] * len(self.running.choices)
        to_echo = set(range(len(offsets))) if self.asked.echo else set()
        async for choice, event in self.running.events():
            index = choice.index
            if index in to_echo:
                to_echo.remove(index)
                logprobs = None
                if self.asked.reports_logprobs:
                    prompt = self._prompt_logprobs(choice, choice.stream.completion)
                    logprobs = self._text_logprobs(prompt, 0)
                    offsets[index] = sum(self._text_length(token.token_id) for token in prompt)
                yield self._chunk(
                    [self._text_delta(index, self._prompt_text(choice), logprobs, None)]
                )
            if isinstance(event, Completion):
                reason = finish_reason(event) if self._has_tokens else "length"
                yield self._chunk([self._text_delta(index, "", None, reason)])
            elif self._has_tokens and (event.text or self.asked.reports_logprobs):
                logprobs = None
                if self.asked.reports_logprobs:
                    logprobs = self._text_logprobs([event.token], offsets[index])
                    offsets[index] += self._text_length(event.token_id)
                yield self._chunk([self._text_delta(index, event.text, logprobs, None)])

    def _text_delta(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async def _chat_chunks(self) -> AsyncGenerator[bytes, None]:
        call_id = None
        if self.asked.options.tools and self._tokenizer is not None:
            call_id = self._tokenizer.token_id(CALL_TOKENS[0])
        calling: set[int] = set()  # choices that write calls, which are sent at their end
        held: dict[int, str] = {}
        opened = False
        async for choice, event in self.running.events():
            index = choice.index
            if not opened:  # an answer begins with its first token, and not before
                opened = True
                for each in self.running.choices:
                    opening = {"role": "assistant", "content": ""}
                    yield self._chunk([self._chat_delta(each.index, opening)])
            if isinstance(event, TokenEvent):
                if event.token_id == call_id:
                    calling.add(index)
                logprobs = None
                if self.asked.reports_logprobs:
                    logprobs = self._chat_logprobs([event.token])
                text = event.text
                if index in calling:
                    held[index] = held.get(index, "") + text
                    text = ""
                if text or logprobs:
                    yield self._chunk([self._chat_delta(index, {"content": text}, logprobs)])
                continue
            _, calls = self._read_answer(event) if index in calling else ("", [])
            reason = finish_reason(event, calls)
            if calls:
                made = [{"index": at, **_call_json(call)} for at, call in enumerate(calls)]
                yield self._chunk([self._chat_delta(index, {"tool_calls": made})])
            elif held.get(index):  # malformed, and so text
                yield self._chunk([self._chat_delta(index, {"content": held[index]})])
            yield self._chunk([self._chat_delta(index, {}, None, reason)])

    def _chat_delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        return event({**self._head, "object": kind, "choices": choices, **more})


def event(data: dict[str, Any]) -> bytes:
    """Return a server-sent event with JSON."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def finish_reason(completion: Completion, calls: Sequence[FunctionCall] = ()) -> str:
    """Return OpenAI's name of why a choice ended, which has ``calls``."""
    if completion.finish_reason != "stop":
        return "length"
    return "tool_calls" if calls else "stop"


def _call_json(call: FunctionCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
