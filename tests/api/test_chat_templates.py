"""Bundles keep the chat template of their model: conversations, stops, tools, literal text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemma3_export
from gemma3_export import InputError, Model
from gemma3_export.api.model_runtimes import ModelRuntimes
from gemma3_export.runtimes.protocol import Logits
from gemma3_export.tokenizer import load_tokenizer
from tests.support.chat_templates import ADDED_TOKENS, WEATHER, chat_bundle
from tests.support.command_line import error_line, json_lines, run_ok, run_rejected
from tests.support.fake_runtime import FakeRuntime

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def bundles() -> dict[str, Path]:
    return {name: chat_bundle(name) for name in ("chatml", "functiongemma")}


def opened(bundle: Path) -> Model:
    return Model(bundle, device="cpu", threads=1)


class Script(FakeRuntime):
    """A runtime that answers with a list of texts, one after each prompt."""

    def __init__(self, model: Model, answers: Sequence[str]) -> None:
        super().__init__(model.config)
        assert model.tokenizer is not None
        encode = model.tokenizer.encode
        self.scripts = [encode(answer, add_bos=False) for answer in answers]
        self.prompts: list[list[int]] = []

    def logits_after(self, history: Sequence[int]) -> Logits:
        logits = np.zeros(self.config.vocab_size, np.float32)
        if self.prompts:
            written = history[len(self.prompts[-1]) :]
            script = self.scripts[len(self.prompts) - 1]
            logits[script[min(len(written), len(script) - 1)]] = 9
        return logits


def scripted(bundle: Path, monkeypatch: pytest.MonkeyPatch, *answers: str) -> tuple[Model, Script]:
    model = opened(bundle)
    runtime = Script(model, answers)
    monkeypatch.setattr(ModelRuntimes, "_open", lambda self, needs_every_token: runtime)
    encode = Model.encode

    def recording(self: Model, prompt: Any, options: Any = None) -> list[int]:
        runtime.prompts.append(encode(self, prompt, options))
        return runtime.prompts[-1]

    monkeypatch.setattr(Model, "encode", recording)
    return model, runtime


class TestTheBundle:
    @pytest.mark.parametrize("name", ["chatml", "functiongemma"])
    def test_it_has_the_template_and_settings_of_its_source(
        self, bundles: dict[str, Path], name: str
    ) -> None:
        written = json.loads((bundles[name] / "tokenizer_config.json").read_text())
        assert written["chat_template"] == ADDED_TOKENS[name][0]
        assert written["model_max_length"] == 77
        assert written["model_input_names"] == ["input_ids", "attention_mask"]

    def test_transformers_renders_the_same_from_it(self, bundles: dict[str, Path]) -> None:
        transformers = pytest.importorskip("transformers")
        for name, bundle in bundles.items():
            theirs = transformers.AutoTokenizer.from_pretrained(bundle)
            expected = theirs.apply_chat_template(
                USER, return_dict=False, add_generation_prompt=True
            )
            assert opened(bundle).encode(USER) == expected, name

    def test_a_conversation_stops_at_the_end_of_turn_of_its_template(
        self, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, _ = scripted(bundles["chatml"], monkeypatch, "Yes.<|im_end|> never", "A<eos>")
        done = model.generate(USER)
        assert (done.text, done.finish_reason) == ("Yes.", "stop")
        assert model.tokenizer is not None
        assert done.stop_reason == model.tokenizer.token_id("<|im_end|>")
        assert model.generate(USER).text == "A"


class TestStops:
    @pytest.mark.parametrize(
        "options",
        [
            {"stop": "<|im_end|>"},
            {"stop": ("zzz", "<|im_end|>")},
            {"stop_tokens": "<|im_end|>"},
            {"stop_tokens": ("<|im_end|>",)},
            {"stop_tokens": [601]},
            {"stop_tokens": 601},
        ],
    )
    def test_a_control_token_stops_as_text_name_or_id(
        self, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        model, _ = scripted(bundles["chatml"], monkeypatch, "Yes.<|im_end|> on")
        done = model.generate("hello", max_new_tokens=6, **options)
        assert (done.text, done.finish_reason, done.stop_reason) == ("Yes.", "stop", 601)

    def test_text_that_no_token_stops_still_stops(
        self, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, _ = scripted(bundles["chatml"], monkeypatch, "Yes. And<mask> on", "Yes. And")
        assert model.generate("hello", stop="<mask>").text == "Yes. And"
        assert model.generate("hello", stop=" And").text == "Yes."

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"stop_tokens": 999}, "stop token 999 does not exist; token ids are from 0 to 601"),
            ({"stop_tokens": -1}, "stop token -1 does not exist"),
            ({"stop_tokens": "<|im_edn|>"}, "has no token '<|im_edn|>'"),
            ({"stop_tokens": 1.5}, "stop_tokens is 1.5"),
            ({"stop_tokens": (True,)}, "stop_tokens is"),
            ({"stop": "<eos>\n"}, "contains the special token '<eos>'"),
        ],
    )
    def test_stops_that_cannot_match_are_rejected(
        self, bundles: dict[str, Path], options: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(InputError) as caught:
            opened(bundles["chatml"]).generate("hello", **options)
        assert named in str(caught.value)

    def test_special_tokens_are_shown_on_request(
        self, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = "a<start_of_turn>b<bos>c<|im_end|>"
        model, _ = scripted(bundles["chatml"], monkeypatch, *[answer] * 3)
        stop = {"stop": "<|im_end|>"}
        assert model.generate("x", **stop).text == "abc"
        assert model.generate("x", show_special_tokens=True, **stop).text == answer[:-10]
        shown = model.generate("x", show_special_tokens=True, stop="<bos>c")
        assert shown.text == "a<start_of_turn>b"


class TestLiteralText:
    def test_spelled_control_tokens_of_a_prompt_are_plain_text(
        self, bundles: dict[str, Path]
    ) -> None:
        for bundle in bundles.values():
            model = opened(bundle)
            assert model.tokenizer is not None
            control = model.tokenizer.control_token_ids
            text = "<bos>a<eos><|im_end|><start_of_turn><start_function_call><escape>"
            options = gemma3_export.GenerateOptions(allow_control_tokens=False)
            literal = model.encode(text, options)
            assert set(literal) & control == {2}
            assert literal[0] == 2
            assert literal.count(2) == 1
            assert model.tokenizer.decode(literal) == text
            assert len(set(model.encode(text)) & control) > 3

    def test_the_option_must_be_a_flag(self) -> None:
        with pytest.raises(InputError, match="allow_control_tokens"):
            gemma3_export.GenerateOptions(allow_control_tokens="no")


class TestFunctionCalls:
    CALL = "<start_function_call>call:get_weather{city:<escape>Graz<escape>}<end_function_call>"

    def test_a_chat_calls_functions_and_gets_their_results(
        self, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = [
            f"{self.CALL}<start_function_response>never",
            "It is cold.<end_of_turn>",
            "Bye.<end_of_turn>",
        ]
        model, runtime = scripted(bundles["functiongemma"], monkeypatch, *answers)
        chat = model.chat(tools=[WEATHER])
        assert chat.calls == []
        done = chat.send("Weather in Graz?")
        assert done.text == self.CALL
        (call,) = chat.calls
        assert (call.name, call.arguments) == ("get_weather", {"city": "Graz"})
        assert chat.respond({"degrees": -3, "sky": "clear"}).text == "It is cold."
        assert chat.calls == []
        assert chat.send("Thanks").text == "Bye."
        assert model.tokenizer is not None
        text = model.tokenizer.decode(runtime.prompts[-1], skip_special_tokens=False)
        assert text.startswith(
            "<bos><start_of_turn>developer\nYou are a model that can do function"
        )
        assert text.endswith(
            "<start_of_turn>user\nWeather in Graz?<end_of_turn>\n"
            f"<start_of_turn>model\n{self.CALL}<start_function_response>response:get_weather"
            "{degrees:-3,sky:<escape>clear<escape>}<end_function_response>"
            "It is cold.<end_of_turn>\n<start_of_turn>user\nThanks<end_of_turn>\n"
            "<start_of_turn>model\n"
        )
        assert runtime.prompts[1][: len(runtime.prompts[0])] == runtime.prompts[0]

    def test_results_must_match_the_calls(
        self, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, _ = scripted(bundles["functiongemma"], monkeypatch, f"{self.CALL}<end_of_turn>")
        chat = model.chat(tools=[WEATHER])
        with pytest.raises(InputError, match="calls no function"):
            chat.respond()
        chat.send("Weather?")
        with pytest.raises(InputError, match="calls 1 functions, and there are 2 results"):
            chat.respond(1, 2)

    def test_a_call_that_is_cut_short_stays_text_and_says_so(
        self, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, _ = scripted(bundles["functiongemma"], monkeypatch, self.CALL)
        chat = model.chat(tools=[WEATHER], max_new_tokens=12)
        done = chat.send("Weather?")
        assert chat.messages[-1] == {"role": "assistant", "content": done.text}
        with pytest.raises(InputError, match="malformed"):
            _ = chat.calls

    def test_calls_in_another_format_are_not_taken_for_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = chat_bundle("llama")
        model, _ = scripted(bundle, monkeypatch, '{"name": "get_weather"}<|eot|>', "Yes.<|eot|>")
        chat = model.chat(tools=[WEATHER])
        chat.send("Weather?")
        with pytest.raises(InputError, match="only FunctionGemma's calls are read"):
            _ = chat.calls
        chat = model.chat()
        chat.send("Weather?")
        assert chat.calls == []

    def test_a_template_without_tools_rejects_them(self, bundles: dict[str, Path]) -> None:
        with pytest.raises(InputError, match="does not use tools"):
            opened(bundles["chatml"]).generate(USER, tools=[WEATHER])

    def test_tools_must_be_a_list_of_objects(self) -> None:
        for tools in (WEATHER, "x", [3], [{3: 4}]):
            with pytest.raises(InputError, match="tools"):
                gemma3_export.GenerateOptions(tools=tools)


class TestTheCommand:
    def test_tools_come_from_a_file_and_calls_go_to_json(
        self, bundles: dict[str, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
        arguments = ("generate", bundles["functiongemma"], "--chat", "--prompt", "hi", "--json")
        (found,) = json_lines(
            run_ok(*arguments, "--tools", tmp_path / "tools.json", "--max-new-tokens", 3)
        )
        tokenizer = load_tokenizer(bundles["functiongemma"])
        options = gemma3_export.GenerateOptions(tools=[WEATHER]).chat()
        messages = [*tokenizer.chat.opening(None, [WEATHER]), *USER]
        assert found["prompt_tokens"] == len(tokenizer.encode_chat(messages, options))
        assert found["function_calls"] == []
        assert "function_calls" not in json_lines(run_ok(*arguments, "--max-new-tokens", 1))[0]

    @pytest.mark.parametrize(
        ("text", "named"),
        [("{", "not valid JSON"), ("{}", "list of JSON"), ("[3]", "list of JSON")],
    )
    def test_a_damaged_file_of_tools_is_rejected(
        self, bundles: dict[str, Path], tmp_path: Path, text: str, named: str
    ) -> None:
        (tmp_path / "tools.json").write_text(text)
        arguments = ("generate", bundles["functiongemma"], "--chat", "--prompt", "hi")
        assert named in error_line(*arguments, "--tools", tmp_path / "tools.json")

    def test_literal_prompts_have_no_control_tokens(self, bundles: dict[str, Path]) -> None:
        arguments = ("generate", bundles["chatml"], "--max-new-tokens", 1, "--json")
        prompt = ("--prompt", "a<|im_end|>")
        plain, literal = (
            json_lines(run_ok(*arguments, *prompt, *more))[0]["prompt_tokens"]
            for more in ((), ("--literal",))
        )
        assert plain == 3
        assert literal > plain

    def test_options_of_templates_need_chat(self, bundles: dict[str, Path]) -> None:
        for option in ("--tools", "--chat-template", "--system"):
            arguments = ("generate", bundles["chatml"], "--prompt", "hi", option, "x")
            assert "needs --chat" in run_rejected(*arguments)

    def test_stop_tokens_are_ids_or_names(self, bundles: dict[str, Path]) -> None:
        arguments = ("generate", bundles["chatml"], "--prompt", "hi", "--json")
        (free,) = json_lines(run_ok(*arguments, "--max-new-tokens", 4))
        token_id = free["token_ids"][2]
        tokenizer = load_tokenizer(bundles["chatml"])
        first = free["token_ids"].index(token_id)
        names = [str(token_id)]
        if tokenizer.token_id(tokenizer.token_text(token_id)) == token_id:
            names.append(tokenizer.token_text(token_id))
        for name in names:
            (found,) = json_lines(run_ok(*arguments, "--stop-token", name))
            assert found["token_ids"] == free["token_ids"][: first + 1]
            assert found["stop_reason"] == token_id
        assert "has no token" in error_line(*arguments, "--stop-token", "no such token")
