"""Grammars that llguidance enforces: of a JSON schema, or of a regular expression.

Bounds keep a hostile schema or pattern from taking the machine: the size of the source, the states
of the lexer, and the work for one token. A grammar is tried on a few bytes when it is made, so that
most of those that are too complex, or match nothing, are rejected before a model is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.limits import shown
from gemma3_export.runtimes.structured.json_schema import check_json_schema

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "MAX_REGEX_CHARACTERS",
    "Grammar",
    "check_source",
    "import_llguidance",
    "parser_limits",
]

MAX_REGEX_CHARACTERS = 2**14
TRIED_BYTES = 16
MAX_LEXER_STATES = 50_000  # each takes 1 to 2 kB
MAX_EXPRESSIONS = 200_000  # to build a lexer from; of 1,000,000, each token takes 0.2 s
# One spelling per string: with \u escapes, "\u0061" would be a second name for the property "a".
# Bounded white space: a model that likes line breaks would never come to the next key.
JSON_OPTIONS = {
    "whitespace_pattern": r"[ \t\r\n]{1,64}",
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
    "coerce_one_of": False,
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A checked grammar.

    Attributes:
        option: what it comes from, for messages, such as ``json_schema``.
        source: what llguidance reads.
    """

    option: str
    source: str

    @classmethod
    def of_json_schema(cls, schema: Any) -> Grammar:
        """Return the grammar of JSON texts that validate against a schema.

        Args:
            schema: a mapping, or JSON text of an object.

        Raises:
            InputError: a keyword cannot be enforced, nothing validates, or the schema is too
                complex.
            UnavailableError: llguidance is not installed.
        """
        return _json_schema_grammar(check_json_schema(schema))

    @classmethod
    def of_regex(cls, pattern: Any) -> Grammar:
        """Return the grammar of the texts that a regular expression matches as a whole.

        Args:
            pattern: in the syntax of Rust's ``regex``: no look-around and no references.

        Raises:
            InputError: it is malformed, matches nothing, or is too complex.
            UnavailableError: llguidance is not installed.
        """
        if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_REGEX_CHARACTERS:
            raise InputError(
                f"regex is {shown(pattern)}; it must be a pattern of 1 to "
                f"{MAX_REGEX_CHARACTERS:,} characters"
            )
        try:
            pattern.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"regex is {shown(pattern)}, which has half of a surrogate pair; correct it"
            ) from error
        return _regex_grammar(pattern)


def import_llguidance() -> ModuleType:
    """Import llguidance, which few programs need.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise UnavailableError(
            "json_schema, regex and tool_choice need llguidance; run: pip install "
            "'gemma3-export[structured]'"
        ) from error
    module: ModuleType = llguidance
    return module


def parser_limits() -> Any:
    """Return the limits of every matcher."""
    return import_llguidance().LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES,
        initial_lexer_fuel=MAX_EXPRESSIONS,
        verbose_errors=False,
    )


@lru_cache(maxsize=64)
def _json_schema_grammar(text: str) -> Grammar:
    matcher = import_llguidance().LLMatcher
    try:
        source = matcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise _unusable("json_schema", str(error)) from error
    return _tried(Grammar("json_schema", source))


@lru_cache(maxsize=64)
def _regex_grammar(pattern: str) -> Grammar:
    return _tried(Grammar("regex", import_llguidance().LLMatcher.grammar_from_regex(pattern)))


def check_source(grammar: Grammar) -> None:
    """Check that llguidance takes a grammar, whose token ids must be below 256.

    Raises:
        InputError: it does not.
        UnavailableError: it is not installed.
    """
    library = import_llguidance()
    is_error, messages = library.LLMatcher.validate_grammar_with_warnings(
        grammar.source, library.LLTokenizer("byte"), limits=parser_limits()
    )
    if is_error or messages:  # a warning is about something that is not enforced
        raise _unusable(grammar.option, messages[0])


def _tried(grammar: Grammar) -> Grammar:
    """Return ``grammar`` if a few bytes can be generated from it.

    Raises:
        InputError: llguidance rejects it, nothing matches, or a limit is reached.
    """
    library = import_llguidance()
    check_source(grammar)
    tokenizer = library.LLTokenizer("byte")
    matcher = library.LLMatcher(tokenizer, grammar.source, log_level=0, limits=parser_limits())
    for _ in range(TRIED_BYTES):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise _unusable(grammar.option, matcher.get_error())
        # The highest byte: the lowest ones are white space.
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[:256])
        if not allowed.size:
            break
        matcher.consume_token(int(allowed[-1]))
    return grammar


def _unusable(option: str, message: str) -> InputError:
    """Return the error for a grammar that llguidance does not take."""
    lines = [line for line in message.splitlines() if line.strip()] or ["unknown error"]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    reason = reason.removeprefix("error: ")[:200]
    if reason.startswith("NoExtension"):
        reason = "nothing matches it"
    if "coerce_one_of" in reason:
        reason = "branches of oneOf that may overlap cannot be enforced; write anyOf"
    return InputError(f"{option} cannot be used: {reason}; simplify or correct it")
