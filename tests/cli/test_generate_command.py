"""``generate``: the text and JSON it prints, drafts, chat and stop texts, and its errors."""

from __future__ import annotations

import json
import os
import re

import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.tokenizer import Tokenizer
from tests.support.chat_templates import chat_bundle
from tests.support.command_line import (
    TIMEOUT_S,
    error_line,
    finish,
    json_lines,
    run,
    run_ok,
    run_rejected,
    start,
)


def test_text_goes_to_stdout_and_speeds_to_stderr(tiny_bundle):
    result = run_ok("generate", tiny_bundle, "--prompt", "hello", "--max-new-tokens", 5)
    printed = json_lines(
        run_ok("generate", tiny_bundle, "--prompt", "hello", "--max-new-tokens", 5, "--json")
    )
    assert result.stdout == f"{printed[0]['text']}\n"
    assert "generated 5 tokens" in result.stderr


def test_both_targets_and_the_reference_agree(ort_bundle, portable_bundle):
    arguments = ("--prompt", "the sea", "--max-new-tokens", 12, "--json")
    runs = [
        json_lines(run_ok("generate", ort_bundle, *arguments)),
        json_lines(run_ok("generate", portable_bundle, *arguments)),
        json_lines(run_ok("generate", ort_bundle, *arguments, "--runtime", "reference")),
    ]
    assert runs[0][0]["token_ids"] == runs[1][0]["token_ids"] == runs[2][0]["token_ids"]


def test_json_has_one_object_per_prompt_one_per_line(ort_bundle):
    result = run_ok(
        *("generate", ort_bundle, "--prompt", "one", "--prompt", "two", "--prompt-ids", "2,4"),
        *("--max-new-tokens", 6, "--json", "--logprobs", 2, "--top-k", 20, "--seed", 5),
    )
    first, second, third = json_lines(result)
    assert [first["prompt"], second["prompt"], third["prompt"]] == ["one", "two", None]
    tokenizer = Tokenizer.from_folder(ort_bundle)
    assert first["prompt_tokens"] == len(tokenizer.encode("one"))
    assert {"time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"} <= set(
        first["timings"]
    )
    for completion in (first, second, third):
        assert completion["finish_reason"] in ("length", "stop")
        assert len(completion["logprobs"]) == len(completion["token_ids"])
        assert all(len(entry["top"]) == 2 for entry in completion["logprobs"])
        assert completion["text"] == tokenizer.decode(completion["token_ids"])
    assert result.stdout.isascii()


def test_the_printed_seed_reproduces_the_run(ort_bundle):
    arguments = ("--prompt", "a", "--prompt", "a", "--temperature", 2, "--json")
    first = json_lines(run_ok("generate", ort_bundle, *arguments))
    again = json_lines(run_ok("generate", ort_bundle, *arguments, "--seed", first[0]["seed"]))
    assert [c["token_ids"] for c in first] == [c["token_ids"] for c in again]
    assert first[0]["token_ids"] != first[1]["token_ids"]


def test_several_prompts_are_labeled_and_printed_in_order(ort_bundle):
    result = run_ok(
        *("generate", ort_bundle, "--prompt", "one", "--prompt", "x" * 100),
        *("--max-new-tokens", 3),
    )
    assert result.stdout.startswith("[1/2] one\n")
    assert f"\n[2/2] {'x' * 57}...\n" in result.stdout


def test_prompts_come_from_stdin_and_files(ort_bundle, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file\n", encoding="utf-8")
    result = run_ok(
        *("generate", ort_bundle, "--prompt", "-", "--prompt-file", tmp_path / "prompt.txt"),
        *("--max-new-tokens", 2, "--json"),
        stdin="von Küste zu Küste\n",
    )
    assert [c["prompt"] for c in json_lines(result)] == ["von Küste zu Küste", "from a file"]


def test_chat_wraps_the_prompt_in_turns(ort_bundle):
    arguments = ("generate", ort_bundle, "--prompt", "hi", "--max-new-tokens", 2, "--json")
    chat = json_lines(run_ok(*arguments, "--chat", "--system", "Be brief."))
    tokenizer = Tokenizer.from_folder(ort_bundle)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert chat[0]["prompt_tokens"] == len(tokenizer.encode_chat(messages))
    assert run(*arguments, "--system", "Be brief.").exit_code == 2


def test_stop_text_ends_the_text(ort_bundle):
    arguments = ("generate", ort_bundle, "--prompt", "hello", "--max-new-tokens", 20, "--json")
    text = json_lines(run_ok(*arguments))[0]["text"]
    stopped = json_lines(run_ok(*arguments, "--stop", text[3:5]))[0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == text[3:5]
    assert stopped["text"] == text[: text.index(text[3:5])]


def test_drafts_change_no_token_and_are_counted(ort_bundle):
    repeated = "2," + ",".join(["11,12,13,14,15"] * 8)
    arguments = ("generate", ort_bundle, "--prompt-ids", repeated, "--max-new-tokens", 60)
    plain = run_ok(*arguments, "--json", "--prompt-lookup", 0)
    drafts = [
        run_ok(*arguments, "--json"),
        run_ok(*arguments, "--json", "--draft-model", ort_bundle),
        run_ok(*arguments, "--json", "--runtime", "reference", "--prompt-lookup", 4),
    ]
    assert json_lines(plain)[0]["timings"]["drafted_tokens"] == 0
    assert "drafted" not in plain.stderr
    for drafted in drafts:
        (found,) = json_lines(drafted)
        assert found["token_ids"] == json_lines(plain)[0]["token_ids"]
        counts = found["timings"]["accepted_tokens"], found["timings"]["drafted_tokens"]
        assert 0 < counts[0] <= counts[1]
        assert f"{counts[0]} of {counts[1]} drafted tokens were accepted" in drafted.stderr
    timings = json_lines(drafts[1])[0]["timings"]  # the model itself is never wrong
    assert timings["accepted_tokens"] == timings["drafted_tokens"]


def test_drafts_are_made_by_default_only_where_they_change_no_text(monkeypatch, ort_bundle):
    repeated = "2," + ",".join(["11,12,13,14,15"] * 8)
    arguments = ("generate", ort_bundle, "--prompt-ids", repeated, "--max-new-tokens", 60)
    assert "drafted tokens were accepted" in run_ok(*arguments, "--device", "cpu").stderr
    monkeypatch.setattr(Bundle, "is_quantized", lambda self, runtime: runtime == "onnx")
    assert "drafted" not in run_ok(*arguments, "--device", "cpu").stderr


def test_a_draft_model_must_have_the_same_tokens(ort_bundle, one_layer, tmp_path):
    run_ok(
        *("onnx", "--random-weights", 0, "--config", one_layer, "--no-verify"),
        *("-o", tmp_path / "other"),
    )
    result = run("generate", ort_bundle, "--prompt", "a", "--draft-model", tmp_path / "other")
    assert result.exit_code == 2
    assert "vocabulary of 97 tokens and the model one of 400" in result.stderr


def test_a_terminal_without_utf8_shows_replacement_characters(ort_bundle):
    process = start(
        *("generate", ort_bundle, "--prompt", "日本 ☕", "--temperature", 3, "--seed", 1),
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    out, _ = finish(process)
    assert process.returncode == 0
    assert out


def test_a_closed_pipe_is_not_an_error(ort_bundle):
    process = start("generate", ort_bundle, "--prompt", "a", "--max-new-tokens", 200)
    process.stdout.close()
    complaint = process.stderr.read().decode()
    process.wait(timeout=TIMEOUT_S)
    assert "Traceback" not in complaint
    assert "BrokenPipe" not in complaint


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_rejected(ort_bundle, text):
    assert "prompt 1 is empty" in error_line("generate", ort_bundle, "--prompt", text)


def test_a_prompt_is_required(ort_bundle):
    assert "--prompt" in run_rejected("generate", ort_bundle)


def test_a_prompt_longer_than_the_context_is_rejected(ort_bundle):
    message = error_line("generate", ort_bundle, "--prompt", "z" * 300)
    assert "256" in message


@pytest.mark.parametrize(
    ("values", "says"),
    [(["3"], "not ID=B"), (["a=1"], "not ID=B"), (["3=x"], "not ID=B"), (["3=1", "3=2"], "two")],
)
def test_a_logit_bias_is_one_number_per_token(ort_bundle, values, says):
    options = [word for value in values for word in ("--logit-bias", value)]
    assert says in run_rejected("generate", ort_bundle, "--prompt", "a", *options)


def test_a_bias_decides_the_text(ort_bundle):
    options = ("--logit-bias", "11=100", "--max-new-tokens", 3, "--json")
    done = run_ok("generate", ort_bundle, "--prompt", "a", *options)
    assert json.loads(done.stdout)["token_ids"] == [11, 11, 11]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--top-k", "-3"),
        ("--top-p", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--min-p", "-0.1"),
        ("--repetition-penalty", "0"),
        ("--frequency-penalty", "2.5"),
        ("--presence-penalty", "nan"),
        ("--logit-bias", "3=101"),
        ("--logit-bias", "99999999=1"),
        ("--seed", "-1"),
    ],
)
def test_invalid_sampling_values_are_rejected(ort_bundle, option, value):
    message = error_line("generate", ort_bundle, "--prompt", "a", option, value)
    assert option.removeprefix("--").replace("-", "_") in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-new-tokens", "0"),
        ("--runtime", "tensorflow"),
        ("--device", "tpu"),
        ("--threads", "0"),
        ("--prompt-ids", "1,x"),
        ("--prompt-ids", "400"),
        ("--stop", ""),
        ("--logprobs", "2"),
        ("--unknown",),
    ],
)
def test_invalid_options_are_rejected(ort_bundle, arguments):
    run_rejected("generate", ort_bundle, "--prompt", "a", *arguments)


class TestGrammars:
    """``--json-schema`` and ``--regex``, which ``chat`` and ``batch`` take as well."""

    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("llguidance", reason="run `make setup`")

    def test_the_text_matches_and_a_cut_off_one_is_noted(self, ort_bundle):
        arguments = ("generate", ort_bundle, "--prompt", "Say", "--regex", "[0-9]{4}x")
        result = run_ok(*arguments, "--max-new-tokens", 20)
        assert re.fullmatch("[0-9]{4}x\n", result.stdout)
        assert "incomplete" not in result.stderr
        result = run_ok(*arguments, "--max-new-tokens", 2)
        assert "note: the text is incomplete" in result.stderr
        (data,) = json_lines(run_ok(*arguments, "--max-new-tokens", 2, "--json"))
        assert (data["is_complete"], data["finish_reason"]) == (False, "length")

    def test_a_schema_is_read_from_a_file(self, ort_bundle, tmp_path):
        (tmp_path / "schema.json").write_text('{"enum": ["fish", "Bär"]}', encoding="utf-8")
        options = ("--json-schema", tmp_path / "schema.json", "--max-new-tokens", 30)
        result = run_ok("generate", ort_bundle, "--prompt", "Say", *options)
        assert json.loads(result.stdout) in ("fish", "Bär")
        result = run_ok("chat", ort_bundle, *options, stdin="Say\n")
        assert json.loads(result.stdout) in ("fish", "Bär")

    def test_function_calls_are_bound_to_their_schemas(self, tmp_path):
        parameters = {"properties": {"on": {"type": "boolean"}}, "required": ["on"]}
        tool = {"type": "function", "function": {"name": "light", "parameters": parameters}}
        (tmp_path / "tools.json").write_text(json.dumps([tool]), encoding="utf-8")
        result = run_ok(
            *("generate", chat_bundle("functiongemma"), "--chat", "--prompt", "Say", "--json"),
            *("--tools", tmp_path / "tools.json", "--tool-choice", "light"),
        )
        (data,) = json_lines(result)
        ((call,),) = (data["function_calls"],)
        assert call["name"] == "light"
        assert call["arguments"]["on"] in (True, False)
        assert "--tool-choice needs --tools" in run_rejected(
            "generate", tmp_path, "--prompt", "Say", "--tool-choice", "auto"
        )

    @pytest.mark.parametrize(
        ("option", "value", "problem"),
        [("--regex", "(", "unclosed"), ("--json-schema", '{"uniqueItems": true}', "uniqueItems")],
    )
    @pytest.mark.parametrize("command", ["generate", "batch", "chat"])
    def test_what_cannot_be_enforced_is_rejected_first(
        self, tmp_path, command, option, value, problem
    ):
        """There is no bundle, and no prompt either: neither is looked at."""
        if option == "--json-schema":
            (tmp_path / "schema.json").write_text(value, encoding="utf-8")
            value = tmp_path / "schema.json"
        arguments = {
            "generate": ("--prompt", "Say"),
            "batch": (tmp_path / "in.jsonl", tmp_path / "out.jsonl"),
            "chat": (),
        }
        missing = tmp_path / "missing"
        assert problem in error_line(command, missing, *arguments[command], option, value)
