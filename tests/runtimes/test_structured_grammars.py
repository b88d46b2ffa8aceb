"""Grammars of schemas and regular expressions: all text validates, the rest is rejected by name."""

from __future__ import annotations

import itertools
import json
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.runtimes.structured.constraint import ConstraintFactory, GrammarConstraint
from gemma3_export.runtimes.structured.grammar import Grammar
from gemma3_export.tokenizer import Tokenizer
from gemma3_export.tokenizer.vocabulary import reduce_tokenizer
from tests.support.json_schemas import PERSON, REAL_LIFE, random_schemas
from tests.support.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_gemma_tokenizer

pytest.importorskip("llguidance", reason="run `make setup`")
jsonschema = pytest.importorskip("jsonschema", reason="run `make setup`")

PADDING_ROWS = 9
MOST_TOKENS = 400
CLOSING = re.compile(rb'["\]}]')


def reduced_tokenizer() -> Tokenizer:
    full = tiny_gemma_tokenizer(1200)
    return reduce_tokenizer(full, "latin", vocab_size=1200, needed_ids=(1,)).tokenizer


TOKENIZERS = {
    "gemma": tiny_gemma_tokenizer(1200),
    "byte level": tiny_byte_level_tokenizer(600),
    "reduced": reduced_tokenizer(),
}


class Writer:
    """Writes random text under a constraint, and rather closes strings and objects than not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_token_id is not None
        self.tokenizer = tokenizer
        self.stop_id = tokenizer.eos_token_id
        self.vocab_size = tokenizer.vocab_size + PADDING_ROWS
        self.factory = ConstraintFactory(tokenizer, self.vocab_size)

    def write(self, grammar: Grammar, seed: int) -> tuple[str, GrammarConstraint]:
        random = np.random.default_rng(seed)
        constraint = self.factory.new(grammar, (self.stop_id,))
        written: list[int] = []
        while len(written) < MOST_TOKENS and not constraint.has_ended:
            allowed = np.flatnonzero(constraint.allowed())
            self.check(allowed, constraint)
            closing = [i for i in allowed if CLOSING.search(self.tokenizer.token_bytes(i))]
            some = closing if closing and random.random() < 0.3 else allowed
            token_id = int(random.choice(some))
            constraint.accept(token_id)
            if token_id == self.stop_id:
                break
            written.append(token_id)
        return self.tokenizer.decode(written), constraint

    def check(self, allowed: np.ndarray, constraint: GrammarConstraint) -> None:
        assert allowed.max() < self.tokenizer.vocab_size, "a padding row"
        text = set(allowed.tolist()) - {self.stop_id}
        assert not text & self.tokenizer.control_token_ids
        assert (self.stop_id in allowed) == constraint.is_complete


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def writer(request: pytest.FixtureRequest) -> Writer:
    return Writer(TOKENIZERS[request.param])


@pytest.fixture(scope="module")
def gemma_writer() -> Writer:
    return Writer(TOKENIZERS["gemma"])


def check_json(text: str, schema: Any) -> None:
    """Validate in decimals: to floats, 67.1 is not a multiple of 0.1."""
    decimal = json.loads(json.dumps(schema), parse_float=Decimal)
    jsonschema.Draft202012Validator(decimal).validate(json.loads(text, parse_float=Decimal))


class TestSchemas:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(random_schemas)
    def test_text_for_a_random_schema_validates(self, gemma_writer: Writer, schema: Any) -> None:
        try:
            grammar = Grammar.of_json_schema(schema)
        except InputError:
            assume(False)
        for seed in range(2):
            text, constraint = gemma_writer.write(grammar, seed)
            if constraint.is_complete:
                check_json(text, schema)

    @pytest.mark.parametrize("name", sorted(REAL_LIFE))
    def test_text_for_a_schema_from_real_life_validates(self, writer: Writer, name: str) -> None:
        grammar = Grammar.of_json_schema(REAL_LIFE[name])
        finished = 0
        for seed in range(6):
            text, constraint = writer.write(grammar, seed)
            if constraint.is_complete:
                finished += 1
                check_json(text, REAL_LIFE[name])
        assert finished

    def test_a_mapping_and_its_text_give_the_same_grammar(self) -> None:
        assert Grammar.of_json_schema(PERSON) == Grammar.of_json_schema(json.dumps(PERSON))

    def test_a_string_has_one_spelling(self, gemma_writer: Writer) -> None:
        # With \u escapes, "\u0061" would be a second property "a", of another type.
        schema = {"properties": {"a": {"type": "integer"}}, "type": "object"}
        constraint = gemma_writer.factory.new(Grammar.of_json_schema(schema), ())
        accept_text(constraint, gemma_writer.tokenizer, '{"')
        with pytest.raises(Gemma3ExportError, match="json_schema"):
            accept_text(constraint, gemma_writer.tokenizer, r"\u0061")

    def test_white_space_is_bounded(self, gemma_writer: Writer) -> None:
        constraint = gemma_writer.factory.new(Grammar.of_json_schema({"type": "object"}), ())
        with pytest.raises(Gemma3ExportError, match="json_schema"):
            accept_text(constraint, gemma_writer.tokenizer, "{" + "\n" * 65)

    @pytest.mark.parametrize("text", ["<eos>", "<end_of_turn>", "<0x0A>", "▁ ▁"])
    def test_text_that_looks_like_tokens_is_written_as_text(
        self, gemma_writer: Writer, text: str
    ) -> None:
        written, constraint = gemma_writer.write(Grammar.of_json_schema({"const": text}), 3)
        assert constraint.is_complete
        assert json.loads(written) == text


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_numbers_are_within_their_bounds(kind: str) -> None:
    """llguidance takes a few that are not; those schemas are rejected."""
    library = pytest.importorskip("llguidance")
    parts = [(whole, rest) for whole in ("0", "1", "2", "10") for rest in ("", ".0", ".01", ".5")]
    texts = [sign + whole + rest for sign in ("", "-") for whole, rest in parts]
    bounds = (-1.5, -1, -0.5, 0, 0.5, 1, 1.5, 10)
    lowers = [(key, value) for key in ("minimum", "exclusiveMinimum") for value in bounds]
    uppers = [(key, value) for key in ("maximum", "exclusiveMaximum") for value in bounds]
    tokenizer, tried = library.LLTokenizer("byte"), 0
    for lower, upper in itertools.product(lowers, uppers):
        schema = {"type": kind, **dict((lower, upper))}
        try:
            grammar = Grammar.of_json_schema(schema)
        except InputError:
            continue
        matcher = library.LLMatcher(tokenizer, grammar.source, log_level=0)
        validator = jsonschema.Draft202012Validator(schema)
        for text in texts:
            reader = matcher.deep_copy()
            data = list(text.encode())
            if reader.try_consume_tokens(data) == len(data) and reader.is_accepting():
                tried += 1
                assert validator.is_valid(json.loads(text)), (schema, text)
    assert tried > 100


def accept_text(constraint: GrammarConstraint, tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode_ordinary(text):
        assert constraint.allowed()[token_id] or constraint.accept(token_id) is None
        constraint.accept(token_id)


class TestRegularExpressions:
    @pytest.mark.parametrize(
        "pattern",
        [
            "yes|no",
            "[a-z]{3} [0-9]+é?",
            "▁+x▁?",  # Gemma's tokenizer writes spaces so, and cannot encode the character itself
            "(😀|é){2,4}",
            "[0-9]{4}-[0-9]{2}-[0-9]{2}",
            "(?i)ja|nein",
            r"[^\n]{0,6}\n",
            " leading and trailing ",
        ],
    )
    def test_the_whole_text_matches(self, writer: Writer, pattern: str) -> None:
        finished = 0
        for seed in range(8):
            text, constraint = writer.write(Grammar.of_regex(pattern), seed)
            assert constraint.is_complete == bool(re.fullmatch(pattern, text))
            finished += constraint.is_complete
        assert finished

    @pytest.mark.parametrize(
        ("pattern", "problem"),
        [
            ("(", "unclosed"),
            ("(?=a)b", "look-around"),
            (r"(a)\1", "backreferences"),
            ("", "1 to 16,384 characters"),
            ("a" * 20_000, "1 to 16,384 characters"),
            (7, "1 to 16,384 characters"),
            ("(a{999}){999}", "too many expressions"),
            ("a\ud800", "half of a surrogate pair"),
            ("(" * 3000 + "a" + ")" * 3000, "nest|regex"),
        ],
    )
    def test_what_cannot_be_followed_is_rejected(self, pattern: Any, problem: str) -> None:
        with pytest.raises(InputError, match=f"regex.*({problem})"):
            Grammar.of_regex(pattern)

    def test_a_grammar_that_grows_too_complex_later_is_an_error(self, gemma_writer: Writer) -> None:
        # The trial of the first bytes does not reach the object, which has too many properties.
        wide = {"type": "object", "properties": {f"p{i}": {} for i in range(700)}}
        schema = {"prefixItems": [{"const": "x" * 30}, wide], "minItems": 2, "type": "array"}
        grammar = Grammar.of_json_schema(schema)
        with pytest.raises(Gemma3ExportError, match="json_schema cannot be followed any further"):
            gemma_writer.write(grammar, 0)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def shared(levels: int) -> list[Any]:
    """Return a list that is small in memory and has 2 ** levels elements."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found, found]
    return found


CYCLE: dict[str, Any] = {"type": "array"}
CYCLE["items"] = CYCLE


class TestRejectedSchemas:
    @pytest.mark.parametrize(
        ("schema", "problem"),
        [
            ({"type": "array", "uniqueItems": True}, "'uniqueItems' at \\$ "),
            ({"properties": {"a": {"not": {"type": "null"}}}}, "'not' at \\$.properties.a "),
            ({"items": {"if": {}, "then": {}}}, "'if' at \\$.items "),
            ({"anyOf": [{"contains": {}}]}, r"'contains' at \$.anyOf\[0\] "),
            ({"$defs": {"x": {"dependentRequired": {}}}}, "'dependentRequired' at \\$.\\$defs.x"),
            ({"propertyNames": {"pattern": "^a"}}, "'propertyNames'"),
            ({"unevaluatedProperties": False}, "'unevaluatedProperties'"),
            ({"type": "string", "minLenght": 3}, "'minLenght'"),
            ({"type": "string", "nullable": True}, "'nullable'.*list of types"),
            ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
            ({"items": [{"type": "integer"}]}, "list of items.*prefixItems"),
            ({"type": "string", "format": "postal-code"}, "Unknown format"),
            ({"type": "string", "pattern": "(?!a)b"}, "look-around"),
            ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "overlap.*anyOf"),
            ({"$ref": "https://example.com/schema.json"}, "outside the schema"),
            ({"$ref": "#/$defs/missing"}, "does not exist"),
            ({"$ref": "#/x-a", "x-a": {"const": 2**60}}, "no schema is expected"),
            ({"$ref": "#/default", "default": {"minProperties": 2}}, "no schema is expected"),
            ({"$ref": "#/%64efault", "default": {"minProperties": 2}}, "no schema is expected"),
            ({"$ref": "#/properties", "properties": {"const": True}}, "no schema is expected"),
            ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "nothing matches"),
            ({"$schema": "http://json-schema.org/draft-04/schema#"}, "\\$schema.*draft-04"),
            ({"properties": {"a": {"$id": "https://example.com"}}}, "'\\$id'"),
            ({"type": "integer", "exclusiveMaximum": True}, "exclusiveMaximum.*True"),
            ({"type": "integer", "minimum": 2**60}, "minimum.*2\\*\\*53"),
            ({"const": [{"id": 10**20}]}, "const.*2\\*\\*53"),
            ({"type": "object", "minProperties": 2}, "minProperties 2"),
            ({"exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum 0 .* so close"),
            ({"allOf": [{"exclusiveMaximum": 2}, {"minimum": 1.5}]}, "exclusiveMaximum 2"),
            ({"type": "string", "minLength": -1}, "minLength.*-1"),
            ({"type": "integer", "minimum": 5, "maximum": 2}, "Unsatisfiable"),
            ({"type": "intger"}, "Invalid type"),
            ({"enum": [float("nan")]}, "nan"),
            ({"enum": [{1, 2}]}, "JSON does not have"),
            ({"properties": {1: {}}}, "keys must be strings"),
            (False, "must be a mapping"),
            ([], "must be a mapping"),
            ("{", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ('"a string"', "must be a mapping"),
            (nested(70), "64 levels"),
            (CYCLE, "64 levels"),
            ({"enum": shared(40)}, "values"),
            ({"enum": ["x" * 2_000_000]}, "2,0.. bytes|bytes"),
            ({"allOf": [{"anyOf": [{"required": [f"p{i}"]} for i in range(10)]}] * 8}, "too large"),
            ({"properties": {f"p{i}": {} for i in range(700)}, "type": "object"}, "row has"),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) else "",  # some have no end
    )
    def test_what_cannot_be_enforced_is_named(self, schema: Any, problem: str) -> None:
        with pytest.raises(InputError, match=f"json_schema.*({problem})"):
            Grammar.of_json_schema(schema)

    def test_every_keyword_of_json_schema_is_enforced_or_rejected(self) -> None:
        # Annotations do not validate; formats are annotations too, unless they are enforced.
        annotations = {"title", "description", "default", "deprecated", "readOnly", "writeOnly"}
        annotations |= {"examples", "$comment", "$id", "$schema", "$anchor", "$defs", "definitions"}
        annotations |= {"format"}
        enforced = {
            *("type", "enum", "const", "properties", "patternProperties", "additionalProperties"),
            *("required", "minProperties", "maxProperties", "items", "prefixItems", "minItems"),
            *("maxItems", "minLength", "maxLength", "pattern", "minimum", "maximum", "$ref"),
            *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf", "oneOf"),
        }
        validators = jsonschema.Draft202012Validator
        keywords = set(validators.VALIDATORS) | set(validators.META_SCHEMA["properties"])
        for keyword in sorted(keywords - annotations - enforced):
            with pytest.raises(InputError, match=re.escape(keyword)):
                Grammar.of_json_schema({keyword: {}})


def test_without_llguidance_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UnavailableError, match=r"gemma3-export\[structured\]"):
        Grammar.of_regex("never seen before")
