"""The commands end to end on tiny models: what they print, and how they exit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from gemma3_export import __version__
from gemma3_export.bundle import ONNX_TARGETS, Bundle
from gemma3_export.cli import command_line
from gemma3_export.cli.generate_command import RUNTIMES
from gemma3_export.progress import ProgressBars
from gemma3_export.tokenizer import Tokenizer
from tests.support.tiny_models import write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments], input=stdin)


def run_ok(*arguments: object, stdin: str | bytes | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def objects(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gemma3_export", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_help_lists_the_commands_and_every_command_has_examples():
    commands = command_line.list_commands(None)
    assert {"onnx", "generate", "verify", "inspect"} <= set(commands)
    text = run_ok("--help").output
    for name in commands:
        assert f"\n  {name} " in text
        assert f"gemma3-export {name} " in run_ok(name, "--help").output


def test_help_is_quick_and_imports_nothing_heavy():
    started = time.perf_counter()
    process = start("--help")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert time.perf_counter() - started < 2.0  # 0.15 s on an idle machine
    modules = loaded_modules("from gemma3_export.cli import command_line", "--help")
    assert not modules & {"torch", "transformers", "onnxruntime", "onnx", "tokenizers", "numpy"}


def loaded_modules(imports: str, *arguments: object) -> set[str]:
    code = (
        f"{imports}\nimport sys\n"
        f"try:\n    command_line({[str(a) for a in arguments]!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*sorted(sys.modules), sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stderr.splitlines())


def test_generate_never_imports_torch(ort_bundle):
    modules = loaded_modules(
        "from gemma3_export.cli import command_line",
        *("generate", ort_bundle, "--prompt", "a", "--max-new-tokens", 2),
    )
    assert "onnxruntime" in modules
    assert not modules & {"torch", "transformers", "onnx"}


def test_inspect_needs_no_torch(ort_bundle):
    modules = loaded_modules("from gemma3_export.cli import command_line", "inspect", ort_bundle)
    assert not modules & {"torch", "transformers", "onnxruntime"}


def test_version():
    assert __version__ in run_ok("--version").output


def test_choices_are_those_of_the_exporters():
    from gemma3_export.api.opening import RUNTIMES as BACKENDS
    from gemma3_export.exporters.onnx.trace import TARGETS as TRACER_TARGETS

    assert tuple(TRACER_TARGETS) == ONNX_TARGETS
    assert BACKENDS == RUNTIMES


def test_onnx_exports_proves_and_says_so(one_layer, tmp_path):
    tiny_gemma_tokenizer(300).save(tmp_path / "tokenizer")
    config = json.loads(one_layer.read_text(encoding="utf-8")) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = run_ok(
        *("onnx", "--config", tmp_path / "config.json", "--random-weights", 1),
        *("--tokenizer", tmp_path / "tokenizer", "-o", tmp_path / "out"),
    )
    assert "parity: passed" in result.stdout
    assert f"next: gemma3-export generate {tmp_path / 'out'} --prompt" in result.stdout
    assert Bundle(tmp_path / "out").graph("onnx").verified
    # A line a stage and no progress bar: this is no terminal.
    stages = result.stderr.splitlines()
    assert stages[:3] == ["tracing ...", "writing weights ...", "computing expected values ..."]
    assert stages[3].startswith("comparing ")
    assert all(line.endswith(" ...") for line in stages)
    assert len(stages) < 8


def test_a_long_stage_says_that_it_goes_on(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with ProgressBars() as progress:
        for seconds, stage, done in (
            (0, "writing weights", 5),
            (10, "writing weights", 20),
            (31, "writing weights", 50),
            (32, "comparing prefill-5", 0),
            (40, "comparing decode", 7),
            (65, "comparing chunked", 80),
        ):
            now[0] = seconds
            progress(stage, done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "writing weights ...",
        "writing weights (50%) ...",
        "comparing prefill-5 ...",
        "comparing chunked (80%) ...",
    ]


def test_onnx_without_proof_says_that_nothing_was_proven(one_layer, tmp_path):
    result = run_ok(
        *("onnx", "--config", one_layer, "--random-weights", 3),
        *("-o", tmp_path / "out", "--no-verify", "--target", "portable"),
    )
    assert "NOT CHECKED" in result.stdout
    assert "--prompt-ids" in result.stdout  # there is no tokenizer
    assert not Bundle(tmp_path / "out").graph("onnx").verified
    assert "NONE" in run_ok("inspect", tmp_path / "out").stdout
    refused = run("generate", tmp_path / "out", "--prompt", "hello")
    assert refused.exit_code == 2
    assert "--prompt-ids" in refused.stderr
    ids = run_ok("generate", tmp_path / "out", "--prompt-ids", "2,5,9", "--max-new-tokens", 4)
    assert all(part.isdecimal() for part in ids.stdout.split())


def test_drafts_change_no_token_and_are_counted(ort_bundle):
    repeated = "2," + ",".join(["11,12,13,14,15"] * 8)
    arguments = ("generate", ort_bundle, "--prompt-ids", repeated, "--max-new-tokens", 60)
    plain = run_ok(*arguments, "--json", "--prompt-lookup", 0)
    drafts = [
        run_ok(*arguments, "--json"),
        run_ok(*arguments, "--json", "--draft-model", ort_bundle),
        run_ok(*arguments, "--json", "--runtime", "reference", "--prompt-lookup", 4),
    ]
    assert objects(plain)[0]["timings"]["drafted_tokens"] == 0
    assert "drafted" not in plain.stderr
    for drafted in drafts:
        (found,) = objects(drafted)
        assert found["token_ids"] == objects(plain)[0]["token_ids"]
        counts = found["timings"]["accepted_tokens"], found["timings"]["drafted_tokens"]
        assert 0 < counts[0] <= counts[1]
        assert f"{counts[0]} of {counts[1]} drafted tokens were right" in drafted.stderr
    timings = objects(drafts[1])[0]["timings"]  # the model itself is never wrong
    assert timings["accepted_tokens"] == timings["drafted_tokens"]


def test_drafts_are_made_by_default_only_where_they_change_no_text(monkeypatch, ort_bundle):
    repeated = "2," + ",".join(["11,12,13,14,15"] * 8)
    arguments = ("generate", ort_bundle, "--prompt-ids", repeated, "--max-new-tokens", 60)
    assert "drafted tokens were right" in run_ok(*arguments, "--device", "cpu").stderr
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


def test_generate_streams_the_text_and_reports_speeds_apart(tiny_bundle):
    result = run_ok("generate", tiny_bundle, "--prompt", "hello", "--max-new-tokens", 5)
    printed = objects(
        run_ok("generate", tiny_bundle, "--prompt", "hello", "--max-new-tokens", 5, "--json")
    )
    assert result.stdout == f"{printed[0]['text']}\n"
    assert "generated 5 tokens" in result.stderr


def test_both_targets_and_the_reference_agree(ort_bundle, portable_bundle):
    arguments = ("--prompt", "the sea", "--max-new-tokens", 12, "--json")
    runs = [
        objects(run_ok("generate", ort_bundle, *arguments)),
        objects(run_ok("generate", portable_bundle, *arguments)),
        objects(run_ok("generate", ort_bundle, *arguments, "--runtime", "reference")),
    ]
    assert runs[0][0]["token_ids"] == runs[1][0]["token_ids"] == runs[2][0]["token_ids"]


def test_json_has_one_object_a_prompt_and_line(ort_bundle):
    result = run_ok(
        *("generate", ort_bundle, "--prompt", "one", "--prompt", "two", "--prompt-ids", "2,4"),
        *("--max-new-tokens", 6, "--json", "--logprobs", 2, "--top-k", 20, "--seed", 5),
    )
    first, second, third = objects(result)
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


def test_the_printed_seed_repeats_the_run(ort_bundle):
    arguments = ("--prompt", "a", "--prompt", "a", "--temperature", 2, "--json")
    first = objects(run_ok("generate", ort_bundle, *arguments))
    again = objects(run_ok("generate", ort_bundle, *arguments, "--seed", first[0]["seed"]))
    assert [c["token_ids"] for c in first] == [c["token_ids"] for c in again]
    assert first[0]["token_ids"] != first[1]["token_ids"]


def test_several_prompts_are_labelled_and_in_order(ort_bundle):
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
    assert [c["prompt"] for c in objects(result)] == ["von Küste zu Küste", "from a file"]


def test_chat_wraps_the_prompt_in_turns(ort_bundle):
    arguments = ("generate", ort_bundle, "--prompt", "hi", "--max-new-tokens", 2, "--json")
    chat = objects(run_ok(*arguments, "--chat", "--system", "Be brief."))
    tokenizer = Tokenizer.from_folder(ort_bundle)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert chat[0]["prompt_tokens"] == len(tokenizer.encode_chat(messages))
    assert run(*arguments, "--system", "Be brief.").exit_code == 2


def test_stop_text_ends_the_text(ort_bundle):
    arguments = ("generate", ort_bundle, "--prompt", "hello", "--max-new-tokens", 20, "--json")
    text = objects(run_ok(*arguments))[0]["text"]
    stopped = objects(run_ok(*arguments, "--stop", text[3:5]))[0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == text[3:5]
    assert stopped["text"] == text[: text.index(text[3:5])]


def test_a_terminal_without_utf8_shows_replacements(ort_bundle):
    process = start(
        *("generate", ort_bundle, "--prompt", "日本 ☕", "--temperature", 3, "--seed", 1),
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out


def test_a_closed_pipe_is_no_error(ort_bundle):
    process = start("generate", ort_bundle, "--prompt", "a", "--max-new-tokens", 200)
    process.stdout.close()
    complaint = process.stderr.read().decode()
    process.wait(timeout=60)
    assert "Traceback" not in complaint
    assert "BrokenPipe" not in complaint


def test_verify_writes_its_reports(ort_bundle, tmp_path):
    names = ("report.json", "junit.xml", "page.html")
    result = run_ok(
        *("verify", ort_bundle, "--seed", 3, "--report", tmp_path / names[0]),
        *("--junit", tmp_path / names[1], "--html", tmp_path / names[2]),
    )
    assert result.stdout.rstrip().splitlines()[-1].startswith("PASS")
    report = json.loads((tmp_path / names[0]).read_text(encoding="utf-8"))
    assert report["passed"] is True
    assert report["options"]["seed"] == 3
    ElementTree.parse(tmp_path / names[1])
    assert "<html" in (tmp_path / names[2]).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_verify_against_another_bundle(ort_bundle, portable_bundle):
    result = run_ok("verify", portable_bundle, "--against", ort_bundle, "--json")
    assert json.loads(result.stdout)["baseline"]["target"] == "ort"


@pytest.mark.parametrize("is_folder", [False, True], ids=["its weights", "a folder"])
def test_verify_against_transformers(ort_bundle, tiny_folder, is_folder):
    pytest.importorskip("transformers")
    other = tiny_folder if is_folder else "transformers"
    result = run_ok("verify", ort_bundle, "--against", other, "--json")
    assert json.loads(result.stdout)["baseline"]["runtime"] == "transformers"


def test_verify_against_nothing_known(ort_bundle, tmp_path):
    result = run("verify", ort_bundle, "--against", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "neither a bundle nor" in result.stderr


def test_verify_fails_for_other_weights(ort_bundle, tmp_path):
    write_hf_folder(tmp_path / "other", Bundle(ort_bundle).config, seed=9)
    result = run("verify", ort_bundle, "--weights", tmp_path / "other", "--report", tmp_path / "r")
    assert result.exit_code == 1
    assert json.loads((tmp_path / "r").read_text(encoding="utf-8"))["passed"] is False


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_inspect_says_what_the_bundle_is(ort_bundle, check):
    facts = json.loads(run_ok("inspect", ort_bundle, "--json", *check).stdout)
    (graph,) = facts["graphs"]
    assert facts["model"]["parameters"] == Bundle(ort_bundle).config.num_parameters
    assert graph["cache_bytes_per_token"] == 5 * 2 * 2 * 16 * 4  # layers, k and v, heads, size
    assert graph["operators"]["com.microsoft::GroupQueryAttention"] == 5
    text = run_ok("inspect", ort_bundle, *check).stdout
    assert "proof: passed" in text
    origin = r"^weights: tiny \(safetensors\)\n  model.safetensors: SHA-256 \w{64}$"
    assert re.search(origin, text, re.MULTILINE)
    assert "{" not in text
    assert ("SHA-256 checked" in text) == bool(check)
