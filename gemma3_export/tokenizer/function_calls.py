"""Read the function calls that FunctionGemma writes.

A call is ``<start_function_call>call:NAME{KEY:VALUE,...}<end_function_call>``. A value is a text
between two ``<escape>`` tokens, a number, true, false, null, a list ``[...]`` or an object
``{...}``. Texts may contain anything but ``<escape>``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gemma3_export.errors import InputError
from gemma3_export.tokenizer.template import unused_characters

__all__ = ["CALL_TOKENS", "FunctionCall", "parse_function_calls", "read_function_calls"]

CALL_TOKENS = ("<start_function_call>", "<end_function_call>", "<escape>")
MAX_DEPTH = 64  # of lists and objects in arguments
_NAME = re.compile(r"[^\s{}\[\]:,<>]+")
_BARE = re.compile(r"[^{}\[\],:]*")
_NUMBER = re.compile(r"-?\d{1,4000}(\.\d+)?([eE][+-]?\d{1,4})?")
_WORDS = {"true": True, "false": False, "null": None, "None": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionCall:
    """A call that the model asks for."""

    name: str
    arguments: dict[str, Any]

    def to_message(self) -> dict[str, Any]:
        """Return an entry of ``tool_calls`` in a message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"type": "function", "function": function}


def parse_function_calls(text: str) -> list[FunctionCall]:
    """Return the calls in a text, in order; other text is ignored.

    A text cannot show whether the model wrote a control token or spelled it;
    :func:`read_function_calls` can tell.

    Raises:
        InputError: a call is malformed or incomplete.
    """
    symbols = unused_characters(text, len(CALL_TOKENS))
    for token, symbol in zip(CALL_TOKENS, symbols, strict=True):
        text = text.replace(token, symbol)
    return _Parser(text, symbols).calls()


def read_function_calls(
    token_ids: Iterable[int],
    token_id: Callable[[str], int | None],
    token_bytes: Callable[[int], bytes],
) -> tuple[str, list[FunctionCall]]:
    """Return the text before the first call in a generated sequence, and the calls.

    Args:
        token_ids: what the model generated.
        token_id: returns the id of a token.
        token_bytes: returns the bytes of a token; empty for those to leave out.

    Raises:
        InputError: a call is malformed or incomplete.
    """
    ids = list(token_ids)
    data = [token_bytes(i) for i in ids]
    symbols = unused_characters(b"".join(data).decode("utf-8", errors="replace"), len(CALL_TOKENS))
    for token, symbol in zip(CALL_TOKENS, symbols, strict=True):
        wanted = token_id(token)
        data = [
            symbol.encode() if i == wanted else piece for i, piece in zip(ids, data, strict=True)
        ]
    text = b"".join(data).decode("utf-8", errors="replace")
    return text.partition(symbols[0])[0], _Parser(text, symbols).calls()


class _Parser:
    """A parser of text in which single characters stand for the control tokens."""

    def __init__(self, text: str, symbols: list[str]) -> None:
        self._text = text
        self._start, self._end, self._escape = symbols
        self._at = 0

    def calls(self) -> list[FunctionCall]:
        found = []
        while (start := self._text.find(self._start, self._at)) >= 0:
            self._at = start + 1
            found.append(self._call())
        return found

    def _call(self) -> FunctionCall:
        self._expect("call:")
        match = _NAME.match(self._text, self._at)
        if match is None or self._start in match[0] or self._end in match[0]:
            raise self._error("the name of a function")
        self._at = match.end()
        arguments = self._object(1)
        self._expect(self._end)
        return FunctionCall(name=match[0].replace(self._escape, ""), arguments=arguments)

    def _object(self, depth: int) -> dict[str, Any]:
        self._open("{", depth)
        values: dict[str, Any] = {}
        while not self._closes("}", is_first=not values):
            key = self._key()
            if key in values:
                raise self._error(f"another key than {key!r:.40}")
            self._expect(":")
            values[key] = self._value(depth)
        return values

    def _list(self, depth: int) -> list[Any]:
        self._open("[", depth)
        values: list[Any] = []
        while not self._closes("]", is_first=not values):
            values.append(self._value(depth))
        return values

    def _key(self) -> str:
        if self._text.startswith(self._escape, self._at):
            return self._escaped()
        key = self._bare()
        if not key:
            raise self._error("a key")
        return key

    def _value(self, depth: int) -> Any:
        self._skip_spaces()
        character = self._text[self._at : self._at + 1]
        if character == self._escape:
            return self._escaped()
        if character == "{":
            return self._object(depth + 1)
        if character == "[":
            return self._list(depth + 1)
        start, word = self._at, self._bare()
        if word in _WORDS:
            return _WORDS[word]
        if (match := _NUMBER.fullmatch(word)) is None:
            self._at = start
            raise self._error("<escape>text<escape>, a number, true, false, null, [ or {")
        number = float(word) if match[1] or match[2] else int(word)
        if isinstance(number, float) and not math.isfinite(number):
            self._at = start
            raise self._error("a finite number")
        return number

    def _escaped(self) -> str:
        end = self._text.find(self._escape, self._at + 1)
        text = self._text[self._at + 1 : end]
        if end < 0 or self._start in text or self._end in text:
            raise self._error("a text that ends with <escape>")
        self._at = end + 1
        return text

    def _bare(self) -> str:
        match = _BARE.match(self._text, self._at)
        assert match is not None
        word = match[0]
        for symbol in (self._start, self._end, self._escape):
            word = word.partition(symbol)[0]
        self._at += len(word)
        return word.strip()

    def _open(self, bracket: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(f"at most {MAX_DEPTH} levels of lists and objects")
        self._expect(bracket)

    def _closes(self, bracket: str, *, is_first: bool) -> bool:
        """Skip a closing bracket or the comma between two values; return whether it closed."""
        self._skip_spaces()
        if self._text.startswith(bracket, self._at):
            self._at += 1
            return True
        if not is_first:
            self._expect(",")
        self._skip_spaces()
        return False

    def _expect(self, wanted: str) -> None:
        self._skip_spaces()
        if not self._text.startswith(wanted, self._at):
            raise self._error(CALL_TOKENS[1] if wanted == self._end else repr(wanted))
        self._at += len(wanted)

    def _skip_spaces(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1

    def _error(self, wanted: str) -> InputError:
        found = self._text[self._at : self._at + 30]
        for token, symbol in zip(CALL_TOKENS, (self._start, self._end, self._escape), strict=True):
            found = found.replace(symbol, token)
        where = f"at {found!r}" if found else "at its end"
        return InputError(
            f"the function call is malformed {where}, character {self._at}: expected {wanted}; "
            "generate again, or allow more tokens"
        )
