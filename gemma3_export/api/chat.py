"""A conversation with a model: its messages, and a cache that its turns share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gemma3_export.api.model import GenerateOptions, Model, TextStream
from gemma3_export.api.options import merged
from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.kept_cache import KeptCache
from gemma3_export.runtimes.generation.loop import Completion
from gemma3_export.tokenizer import ChatMessage

__all__ = ["Chat"]

CAPACITY = 4096  # tokens that the first cache has room for; a longer conversation gets a larger one


class Chat:
    """A conversation. Each turn computes only the tokens that are new to its cache.

    A turn is not safe to share between threads; separate conversations of one model are.

    Args:
        model: answers.
        system: a system message.
        options: for every turn; a turn may change them.

    Raises:
        InputError: the bundle's tokenizer has no turn tokens.
    """

    def __init__(
        self, model: Model, system: str | None = None, options: GenerateOptions | None = None
    ) -> None:
        if model.tokenizer is None or not model.tokenizer.is_gemma:
            raise InputError(
                f"{model.bundle.path} has no tokenizer with Gemma's turn tokens, so it cannot hold "
                "a conversation; use generate, or an instruction model's tokenizer"
            )
        self.model = model
        self.options = options or GenerateOptions()
        self.messages: list[ChatMessage] = []
        if system is not None:
            self.messages.append(ChatMessage(role="system", content=system))
        self._kept: KeptCache | None = None

    def send(self, text: str, **changes: Any) -> Completion:
        """Send a message and return the model's answer.

        Args:
            text: the user's message.
            changes: fields of :class:`GenerateOptions`, for this turn.

        Raises:
            InputError: the conversation no longer fits the model's context, or an option is out of
                range; the message is then not part of the conversation.
        """
        stream = self.stream(text, **changes)
        for _ in stream:
            pass
        return stream.completion

    def stream(self, text: str, **changes: Any) -> TextStream:
        """Send a message and yield the answer's text as it is generated.

        The answer becomes part of the conversation when the stream ends or is closed.

        Raises:
            InputError: as :meth:`send`.
        """
        messages = [*self.messages, ChatMessage(role="user", content=text)]
        generation = self.model.start(
            [messages],
            merged(GenerateOptions, self.options, changes),
            kept_cache=self._cache(),
        )
        return TextStream(generation, on_end=self._append_to(messages))

    def _append_to(self, messages: list[ChatMessage]) -> Callable[[Completion], None]:
        def append(completion: Completion) -> None:
            answer = ChatMessage(role="assistant", content=completion.text)
            self.messages = [*messages, answer]

        return append

    def _cache(self) -> KeptCache:
        runtime = self.model.runtime
        if self._kept is None or not self._kept.belongs_to(runtime):
            self._kept = KeptCache(runtime, capacity=CAPACITY)
        return self._kept
