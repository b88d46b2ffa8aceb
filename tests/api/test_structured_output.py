"""Generate under ``json_schema`` and ``regex``: sampling, ends, drafts, batches and chats."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemma3_export
from gemma3_export import GenerateOptions, InputError, Model
from gemma3_export.api.batch import run_batch
from gemma3_export.runtimes.generation.sampling import Sampler, SamplingParams
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.structured.constraint import ConstraintFactory, GrammarConstraint
from gemma3_export.runtimes.structured.grammar import Grammar
from tests.support.chat_templates import WEATHER, chat_bundle
from tests.support.exported_bundles import exported_bundle
from tests.support.fake_runtime import FakeRuntime
from tests.support.generation import generate
from tests.support.json_schemas import PERSON, REAL_LIFE
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

pytest.importorskip("llguidance", reason="run `make setup`")
jsonschema = pytest.importorskip("jsonschema", reason="run `make setup`")

SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "kind": {"enum": ["fish", "bird", "Bär"]},
        "counts": {"type": "array", "items": {"enum": [1, 20, 300]}, "maxItems": 3},
    },
    "required": ["ok", "kind", "counts"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {"json_schema": REAL_LIFE["tree"], "max_new_tokens": 60}
SAMPLING = (
    {},
    {"temperature": 1.5, "seed": 1},
    {"top_k": 3, "seed": 2},
    {"top_p": 0.9, "seed": 3},
    {"min_p": 0.5, "temperature": 3.0, "seed": 4},
    {"repetition_penalty": 1.7, "top_k": 40, "seed": 5},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": 2.0, "presence_penalty": -2.0, "logit_bias": {3: 100.0, 9: -100.0}},
)


@pytest.fixture(scope="module")
def model(ort_bundle: Path) -> Model:
    return gemma3_export.load(ort_bundle, device="cpu", threads=1)


def check(text: str, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


class TestText:
    @pytest.mark.parametrize("sampling", SAMPLING, ids=str)
    def test_it_validates_however_it_is_sampled(self, model: Model, sampling: Any) -> None:
        done = model.generate("Say", json_schema=SMALL, max_new_tokens=200, **sampling)
        # Random weights may prefer white space, of which the grammar allows much.
        assert done.is_complete == (done.finish_reason == "stop")
        if done.is_complete:
            check(done.text, SMALL)
        tokenizer = model.tokenizer
        assert tokenizer is not None
        assert done.text == tokenizer.decode(done.token_ids)

    @pytest.mark.parametrize("sampling", SAMPLING, ids=str)
    def test_a_regular_expression_matches_the_whole_text(self, model: Model, sampling: Any) -> None:
        pattern = "(red|green|blue){2,3} ▁?[0-9]{1,4}é"
        done = model.generate("Say", regex=pattern, max_new_tokens=64, **sampling)
        assert done.is_complete
        assert re.fullmatch(pattern, done.text)

    def test_it_ends_where_nothing_can_follow(self, model: Model) -> None:
        done = model.generate("Say", regex="abc", max_new_tokens=64)
        assert (done.text, done.finish_reason, done.stop_reason) == ("abc", "stop", None)
        tokenizer = model.tokenizer
        assert tokenizer is not None
        assert not set(done.token_ids) & tokenizer.special_token_ids

    def test_a_text_that_may_end_or_go_on_ends_at_a_stop_token(self, model: Model) -> None:
        done = model.generate("Say", regex="a{0,60}", temperature=5.0, seed=3, max_new_tokens=200)
        assert done.finish_reason == "stop"
        assert re.fullmatch("a{0,60}", done.text)

    def test_a_text_that_is_cut_off_is_a_prefix_and_says_so(self, model: Model) -> None:
        for tokens in range(1, 8):
            done = model.generate("Say", regex="😀é▁日本語", max_new_tokens=tokens)
            assert done.finish_reason == "length"
            assert done.is_complete is False
            assert "😀é▁日本語".startswith(done.text)

    def test_a_text_that_is_complete_with_the_last_token_says_so(self, model: Model) -> None:
        tokens = len(model.generate("Say", regex="a+b").token_ids)
        done = model.generate("Say", regex="a+b[0-9]*", max_new_tokens=tokens)
        assert (done.finish_reason, done.is_complete) == ("length", True)

    def test_without_a_grammar_completeness_is_not_claimed(self, model: Model) -> None:
        assert model.generate("Say", max_new_tokens=3).is_complete is None

    def test_log_probabilities_are_those_of_the_model(self, model: Model) -> None:
        free = model.generate("Say", max_new_tokens=1, logprobs=2)
        bound = model.generate("Say", regex="[0-9]", max_new_tokens=1, logprobs=2)
        assert bound.tokens[0].top_logprobs == free.tokens[0].top_logprobs
        assert bound.tokens[0].logprob is not None
        logits = model.logits(model.encode("Say"))[-1]
        log_total = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
        expected = logits[bound.token_ids[0]] - log_total
        assert bound.tokens[0].logprob == pytest.approx(expected, abs=1e-4)


class TestSameText:
    """What must not change the text does not."""

    def test_drafts(self, model: Model) -> None:
        prompt = '{"value": 5, "next": {"value": 5, "next": {"value": 5, "next": {"value": '
        for sampling in ({}, {"top_k": 9, "seed": 1}):
            plain = model.generate(prompt, prompt_lookup=0, **TREE, **sampling)
            drafted = model.generate(prompt, prompt_lookup=8, **TREE, **sampling)
            assert drafted.token_ids == plain.token_ids

    def test_other_prompts_of_the_batch(self, model: Model) -> None:
        prompts = ["One", "Two and more words", "Three"]
        together = model.generate(prompts, **TREE)
        for prompt, done in zip(prompts, together, strict=True):
            assert done.token_ids == model.generate(prompt, **TREE).token_ids

    def test_a_screened_head(self) -> None:
        """A step that selects candidates would miss the tokens that are allowed."""
        bundle, tokenizer = exported_bundle("ort", "screened"), tiny_gemma_tokenizer(2_500)
        grammar = Grammar.of_json_schema(TREE["json_schema"])
        factory = ConstraintFactory(tokenizer, 2_500)
        found = []
        for windowed in (True, False):
            runtime = OnnxRuntime(bundle, device="cpu", threads=1, sliding_window_cache=windowed)
            assert runtime.selects_candidates == windowed
            events = generate(
                runtime,
                [[2, 9, 8]],
                SamplingParams(),
                max_new_tokens=40,
                constraint=lambda: factory.new(grammar, (1,)),
            )
            found.append(events.collect()[0].token_ids)
        assert found[0] == found[1]


def test_masks_are_computed_in_another_thread_while_the_step_runs(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    compute = GrammarConstraint._compute
    begun: list[bool] = []

    def recorded(self: GrammarConstraint) -> Any:
        threads.add(threading.current_thread().name)
        return compute(self)

    step = type(model.runtime).step

    def step_with_mask(*arguments: Any, **options: Any) -> Any:
        begun.append(bool(pending))
        return step(*arguments, **options)

    pending: list[int] = []
    begin, accept = GrammarConstraint.begin, GrammarConstraint.accept

    def begin_recorded(self: GrammarConstraint) -> None:
        pending.append(1)
        begin(self)

    def accept_recorded(self: GrammarConstraint, token_id: int) -> None:
        accept(self, token_id)
        pending.clear()

    monkeypatch.setattr(GrammarConstraint, "_compute", recorded)
    monkeypatch.setattr(GrammarConstraint, "begin", begin_recorded)
    monkeypatch.setattr(GrammarConstraint, "accept", accept_recorded)
    monkeypatch.setattr(type(model.runtime), "step", step_with_mask)
    model.generate("Say", regex="[a-z]{5}", max_new_tokens=9)
    assert len(begun) > 2
    assert all(begun)
    assert all(name.startswith("token-mask") for name in threads)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"json_schema": {"uniqueItems": True}}, "uniqueItems"),
            ({"regex": "("}, "unclosed"),
            ({"json_schema": {}, "regex": "a"}, "exclude each other"),
            ({"regex": "a", "stop": "b"}, "leave stop out"),
            ({"regex": "a", "tools": [{"name": "f"}]}, "leave tools out"),
        ],
    )
    def test_what_cannot_be_followed_is_rejected_before_anything_opens(
        self, options: dict[str, Any], problem: str
    ) -> None:
        with pytest.raises(InputError, match=problem):
            GenerateOptions(**options)

    def test_a_stop_token_ends_the_text_only_where_it_may_end(self, model: Model) -> None:
        letters = tuple("abcdefghijklm")
        pattern = "[a-z]{3}[0-9a-z]{0,40}"
        for seed in range(4):
            done = model.generate(
                "Say", regex=pattern, stop_tokens=letters, temperature=9.0, seed=seed
            )
            assert done.is_complete
            assert re.fullmatch(pattern, done.text)
        with pytest.raises(gemma3_export.Gemma3ExportError, match="change the stop tokens"):
            model.generate("Say", regex="e", stop_tokens=("e", "<0x65>"))

    def test_a_bundle_without_a_tokenizer_is_rejected(self) -> None:
        bare = Model(exported_bundle("ort"), device="cpu")
        with pytest.raises(InputError, match="no tokenizer"):
            bare.generate([2, 4], regex="a")


def test_a_stream_gives_the_text_of_the_completion(model: Model) -> None:
    stream = model.stream("Say", json_schema=SMALL, top_k=5, seed=9, max_new_tokens=80)
    assert "".join(stream) == stream.completion.text
    assert stream.completion.is_complete is not None


def test_a_chat_answers_within_a_schema_and_goes_on(model: Model) -> None:
    chat = model.chat(regex="(yes|no)[.!]", max_new_tokens=9)
    assert re.fullmatch("(yes|no)[.!]", chat.send("Is it?").text)
    assert re.fullmatch("[0-9]", chat.send("How many?", regex="[0-9]").text)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_rows_of_a_batch_say_whether_they_are_complete(model: Model, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One"}\n{"prompt": "Two"}\n', encoding="utf-8")
    run_batch(model, source, target, GenerateOptions(regex="[0-9]{3}", max_new_tokens=9))
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert all(re.fullmatch("[0-9]{3}", row["text"]) and row["is_complete"] for row in rows)


def test_a_grammar_holds_after_a_long_prompt(model: Model) -> None:
    """Past the sliding window, and with a prefill in several chunks."""
    done = model.generate([2, *range(10, 60)], regex="x{3}y", prefill_chunk=16)
    assert done.text == "xxxy"


def test_nan_logits_are_noticed_although_their_tokens_are_not_allowed() -> None:
    logits = FakeRuntime().logits_after([1, 2, 3])
    logits[5] = np.nan
    allowed = np.zeros(logits.size, np.bool_)
    allowed[7] = True
    with pytest.raises(gemma3_export.Gemma3ExportError, match="largest logit is nan"):
        Sampler(SamplingParams()).sample(logits, allowed)


def test_a_schema_may_have_no_limit_on_its_text(model: Model) -> None:
    done = model.generate("Say", json_schema=PERSON, max_new_tokens=40, temperature=1.0, seed=1)
    assert done.text.lstrip()[:1] in ("", "{")


LIGHT = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"enum": ["kitchen", "hall"]},
                "percent": {"type": "integer", "minimum": 0, "maximum": 100},
            },
            "required": ["room", "percent"],
        },
    },
}


class TestFunctionCalls:
    """``tool_choice``, on a model with FunctionGemma's template and random weights."""

    @pytest.fixture(scope="class")
    def caller(self) -> Model:
        return gemma3_export.load(chat_bundle("functiongemma"), device="cpu", threads=1)

    def test_a_chat_calls_the_function_and_goes_on(self, caller: Model) -> None:
        chat = caller.chat(tools=[WEATHER, LIGHT], tool_choice="set_light", max_new_tokens=80)
        done = chat.send("More light!")
        assert done.finish_reason == "stop"
        (call,) = chat.calls
        assert call.name == "set_light"
        check(json.dumps(call.arguments), LIGHT["function"]["parameters"])
        answer = chat.respond({"ok": True}, tool_choice="none", max_new_tokens=5)
        assert "call:" not in answer.text
        assert chat.calls == []

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 3.0, "seed": 2}], ids=str)
    def test_a_call_can_be_required(self, caller: Model, sampling: Any) -> None:
        options = {"tools": [LIGHT], "tool_choice": "required", "max_new_tokens": 120, **sampling}
        done = caller.generate([{"role": "user", "content": "More light!"}], **options)
        tokenizer = caller.tokenizer
        assert tokenizer is not None
        ids = done.token_ids
        end = tokenizer.token_id("<end_function_call>")
        last = max(at for at, token_id in enumerate(ids) if token_id == end)
        text, calls = tokenizer.chat.read_answer(ids[: last + 1])
        assert text == ""
        for call in calls:
            check(json.dumps(call.arguments), LIGHT["function"]["parameters"])

    def test_only_functiongemma_can_be_bound(self, model: Model) -> None:
        with pytest.raises(InputError, match="only FunctionGemma's calls can be constrained"):
            model.generate("Say", tools=[LIGHT], tool_choice="required")

    def test_a_choice_needs_tools_and_no_stop(self, model: Model, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="1 to 128 tools"):
            GenerateOptions(tool_choice="auto")
        with pytest.raises(InputError, match="leave stop or tool_choice out"):
            GenerateOptions(tools=[LIGHT], tool_choice="auto", stop="x")
        options = GenerateOptions(tools=[LIGHT], tool_choice="auto")
        with pytest.raises(InputError, match="batches"):
            run_batch(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", options)
