"""Constrain the tokens of a request to a grammar, with masks computed beside the model's steps.

llguidance sees each token as the bytes that decoding yields for it, so the text of the accepted
tokens is exactly the text that the grammar matched. Control tokens are no text for it: a grammar
allows them only by their ids. Padding rows of the vocabulary are never allowed.

Shapes: V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.errors import Gemma3ExportError
from gemma3_export.processors import available_processors
from gemma3_export.runtimes.structured.grammar import Grammar, import_llguidance, parser_limits
from gemma3_export.tokenizer import Tokenizer

__all__ = ["ConstraintFactory", "GrammarConstraint"]

MAX_MASK_THREADS = 4
NEVER_TEXT = 0xFF  # llguidance's mark of special tokens; no UTF-8 contains it


class ConstraintFactory:
    """Makes the constraints of one tokenizer; safe to share between threads.

    Args:
        tokenizer: decodes what is generated.
        vocab_size: logits per position; those without a token are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._library_tokenizer: Any = None
        self._making = threading.Lock()

    def new(self, grammar: Grammar, stop_token_ids: Iterable[int]) -> GrammarConstraint:
        """Return a constraint for one request, which ends with one of ``stop_token_ids``.

        Raises:
            UnavailableError: llguidance is not installed.
        """
        with self._making:
            if self._library_tokenizer is None:
                words = _Words(self._tokenizer, self._vocab_size)
                self._library_tokenizer = import_llguidance().LLTokenizer(words)
        return GrammarConstraint(
            self._library_tokenizer, grammar, self._vocab_size, tuple(stop_token_ids)
        )


class _Words:
    """The vocabulary as llguidance reads it: an object with these attributes.

    One more token is added at the end, the end of the text. It represents all tokens that end a
    request, which differ between requests, while making this takes a second.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        control = tokenizer.control_token_ids
        self.tokens = [
            _text_bytes(tokenizer.token_bytes(token_id)) for token_id in range(vocab_size)
        ]
        self.tokens.append(b"<end of text>")
        self.eos_token_id = vocab_size
        self.special_token_ids = [*sorted(i for i in control if i < vocab_size), vocab_size]
        self._tokenizer = tokenizer
        self._byte_ids = {
            token[0]: token_id for token_id, token in enumerate(self.tokens) if len(token) == 1
        }

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text that the grammar leaves no choice about.

        Where the tokenizer changes a text, as Gemma's makes a space of ``▁``, each byte becomes a
        token. A byte without one becomes the end of the text, which the grammar then rejects.
        """
        ids = self._tokenizer.encode_ordinary(text)
        data = text.encode()
        if b"".join(self.tokens[token_id] for token_id in ids) == data:
            return ids
        return [self._byte_ids.get(byte, self.eos_token_id) for byte in data]


def _text_bytes(data: bytes) -> bytes:
    return b"" if data[:1] == bytes([NEVER_TEXT]) else data


class GrammarConstraint:
    """The state of one request within its grammar; one thread at a time may use it."""

    def __init__(
        self,
        library_tokenizer: Any,
        grammar: Grammar,
        vocab_size: int,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self._matcher = import_llguidance().LLMatcher(
            library_tokenizer, grammar.source, log_level=0, limits=parser_limits()
        )
        self._option = grammar.option
        self._vocab_size = vocab_size
        self._stop_token_ids = np.array(stop_token_ids, np.int64)
        self._mask: Future[NDArray[np.bool_]] | None = None
        self.is_complete = bool(self._matcher.is_accepting())  # the text so far matches
        self.has_ended = False  # no text can follow

    def begin(self) -> None:
        """Start computing which tokens may come next, in another thread."""
        if self._mask is None:
            self._mask = _mask_threads().submit(self._compute)

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens [V] may come next.

        Raises:
            Gemma3ExportError: the grammar has become too complex.
        """
        self.begin()
        assert self._mask is not None
        return self._mask.result()

    def accept(self, token_id: int) -> None:
        """Add a token that was allowed.

        Raises:
            Gemma3ExportError: it was not, or the grammar has become too complex.
        """
        self.allowed()  # the matcher is used by one thread at a time
        self._mask = None
        if token_id in self._stop_token_ids:
            token_id = self._vocab_size
        if not self._matcher.consume_token(token_id):
            raise self._error()
        self.is_complete = bool(self._matcher.is_accepting())
        self.has_ended = bool(self._matcher.is_stopped())

    def _compute(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._error()
        found = np.unpackbits(bits, bitorder="little", count=self._vocab_size + 1).view(np.bool_)
        allowed = found[: self._vocab_size]
        allowed[self._stop_token_ids] = found[-1]  # also those that are text to other requests
        if not allowed.any():
            raise Gemma3ExportError(
                f"no token may follow, although {self._option} is not matched: the next one ends "
                "the generation, or the tokenizer lacks it; change the stop tokens"
            )
        return allowed

    def _error(self) -> Gemma3ExportError:
        reason = (self._matcher.get_error().splitlines() or ["unknown error"])[0][:200]
        return Gemma3ExportError(
            f"{self._option} cannot be followed any further: {reason}; simplify it"
        )


@cache
def _mask_threads() -> ThreadPoolExecutor:
    """Return the threads that compute masks; llguidance lets go of the interpreter meanwhile."""
    count = min(MAX_MASK_THREADS, available_processors())
    return ThreadPoolExecutor(count, thread_name_prefix="token-mask")
