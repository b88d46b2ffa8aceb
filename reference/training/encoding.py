"""Encode documents and examples to token ids, and mark those that the loss counts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from gemma3_export.errors import InputError
from gemma3_export.reference.training.documents import Document
from gemma3_export.reference.training.options import LOSS_ON, LossOn
from gemma3_export.reference.training.rows import Example, Split
from gemma3_export.reference.training.token_data import BEGINS_DOCUMENT, IS_LEARNED
from gemma3_export.tokenizer import CONTROL_TOKENS, ChatOptions, Tokenizer

__all__ = ["Encoded", "Encoder"]

# Looks like a special token. Gemma has thousands of them, too many for one pattern.
_CANDIDATE = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]")
FOREIGN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>")  # of other models' chat formats


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """The tokens of a document or of a piece of one."""

    token_ids: Sequence[int]
    marks: bytes  # one per token: IS_LEARNED and BEGINS_DOCUMENT
    characters: int  # of text
    is_start: bool
    is_end: bool
    split: Split | None


class Encoder:
    """Encodes documents and examples.

    Args:
        tokenizer: encodes; its chat template renders conversations.
        loss_on: learn the answers of an example only, or all of it. Plain text is always learned.
        parse_special_tokens: encode special tokens spelled out in plain text as one token each,
            not as characters. In messages they are always characters.

    Attributes:
        spelled: for each special token that was encoded as characters, the documents with it.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, loss_on: LossOn, parse_special_tokens: bool
    ) -> None:
        if loss_on not in LOSS_ON:
            raise InputError(f"loss_on is {loss_on!r:.40}; choose {' or '.join(LOSS_ON)}")
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.parse_special_tokens = parse_special_tokens
        self.spelled: Counter[str] = Counter()

    @property
    def description(self) -> dict[str, Any]:
        """Return JSON that changes with the options and the chat template."""
        templates = json.dumps(dict(self.tokenizer.settings.templates), sort_keys=True)
        return {
            "loss_on": self.loss_on,
            "parse_special_tokens": self.parse_special_tokens,
            "templates_sha256": hashlib.sha256(templates.encode()).hexdigest(),
        }

    def encode(self, items: Sequence[Document | Example]) -> Iterator[Encoded]:
        """Encode items in order, plain text on all cores.

        Raises:
            InputError: an example does not fit the chat template, or has nothing to learn.
        """
        for is_plain, group in groupby(items, lambda item: isinstance(item, Document)):
            if is_plain:
                yield from self._documents([item for item in group if isinstance(item, Document)])
            else:
                yield from (self._example(item) for item in group if isinstance(item, Example))

    def _documents(self, pieces: Sequence[Document]) -> Iterator[Encoded]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        assert eos is not None
        for piece, found in zip(pieces, self._plain([piece.text for piece in pieces]), strict=True):
            ids = found
            if piece.is_start:
                ids = self._once_at_start(ids)
            if piece.is_end and ids[-1:] != [eos]:
                ids = [*ids, eos]
            marks = bytearray([IS_LEARNED]) * len(ids)
            if piece.is_start and bos is not None:
                marks[0] = 0  # nothing comes before it
            yield _encoded(ids, marks, len(piece.text), piece.is_start, piece.is_end, piece.split)

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if self.parse_special_tokens:
            return [self.tokenizer.encode(text, add_bos=False) for text in texts]
        for text in texts:
            self.spelled.update(self._spelled_in(text))
        return self.tokenizer.encode_ordinary_batch(texts)

    def _once_at_start(self, ids: list[int]) -> list[int]:
        """Return ``ids`` with exactly one ``<bos>`` at the start, if the tokenizer has one."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        first = next((index for index, found in enumerate(ids) if found != bos), len(ids))
        return [bos, *ids[first:]]

    def _example(self, example: Example) -> Encoded:
        try:
            if not example.messages:
                ids, learned = self._completion(example)
            elif example.prompt_messages is None:
                ids, learned = self._conversation(example)
            else:
                ids, learned = self._prompt_messages(example)
        except InputError as error:
            raise InputError(f"{example.where}: {error}") from error
        if self.loss_on == "all":
            learned = [True] * len(ids)
        elif not any(learned[1:]):
            raise InputError(
                f"{example.where} has no answer to learn; add a message of the assistant, remove "
                "the row, or pass --loss-on all"
            )
        marks = bytearray(IS_LEARNED * is_learned for is_learned in learned)
        if ids[:1] == [self.tokenizer.bos_token_id]:
            marks[0] = 0
        size = sum(map(len, example.texts()))
        return _encoded(ids, marks, size, True, True, example.split)

    def _conversation(self, example: Example) -> tuple[list[int], list[bool]]:
        """Encode a conversation, in which the assistant's messages are the answers."""
        found = self.tokenizer.encode_chat_answers(example.messages, _chat_options(example))
        return found.token_ids, found.is_answer

    def _prompt_messages(self, example: Example) -> tuple[list[int], list[bool]]:
        """Encode a conversation, in which everything after the prompt is the answer."""
        options, count = _chat_options(example), example.prompt_messages
        prompt = self.tokenizer.encode_chat(example.messages[:count], options)
        whole = self.tokenizer.encode_chat(example.messages, options, add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            raise InputError(
                "the chat template renders the prompt differently when the completion follows, so "
                "what generation sees is not what training would; give the row as messages"
            )
        return whole, [False] * len(prompt) + [True] * (len(whole) - len(prompt))

    def _completion(self, example: Example) -> tuple[list[int], list[bool]]:
        """Encode plain text, in which the completion and ``<eos>`` are the answer.

        The text is encoded as a whole, unless a token would then span prompt and completion:
        generation sees the prompt alone.
        """
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        together = example.prompt + example.completion
        prompt, completion, whole = self._plain([example.prompt, example.completion, together])
        if whole[: len(prompt)] != prompt:
            whole = prompt + completion
        answer = whole[len(prompt) :]
        if answer[-1:] != [eos]:
            answer = [*answer, eos]
        prompt = self._once_at_start(prompt)
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def _spelled_in(self, text: str) -> set[str]:
        return {found for found in _CANDIDATE.findall(text) if found in self._special_texts}

    @cached_property
    def _special_texts(self) -> frozenset[str]:
        own = map(self.tokenizer.token_text, self.tokenizer.control_token_ids)
        return frozenset((*own, *CONTROL_TOKENS, *FOREIGN_TOKENS)) - {""}


def _encoded(
    ids: list[int],
    marks: bytearray,
    characters: int,
    is_start: bool,
    is_end: bool,
    split: Split | None,
) -> Encoded:
    if is_start and marks:
        marks[0] |= BEGINS_DOCUMENT
    return Encoded(
        token_ids=ids,
        marks=bytes(marks),
        characters=characters,
        is_start=is_start,
        is_end=is_end,
        split=split,
    )


def _chat_options(example: Example) -> ChatOptions:
    return ChatOptions(tools=example.tools, variables=example.variables)
