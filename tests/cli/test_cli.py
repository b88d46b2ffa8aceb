"""The command line as a whole: its help, what it imports, its progress, and its errors."""

from __future__ import annotations

import json
import re
import time

import click
import pytest

from gemma3_export import __version__
from gemma3_export.api import verification as verifying
from gemma3_export.bundle import ONNX_TARGETS, RUNTIMES
from gemma3_export.cli import command_line
from gemma3_export.progress import ProgressBars
from tests.support.command_line import error_line, loaded_modules, run, run_ok, run_rejected


def test_help_lists_the_commands_and_every_command_has_examples():
    commands = command_line.list_commands(None)
    assert {"onnx", "generate", "verify", "inspect"} <= set(commands)
    text = run_ok("--help").output
    for name in commands:
        assert f"\n  {name} " in text
        assert f"gemma3-export {name} " in run_ok(name, "--help").output


@pytest.mark.parametrize("command", command_line.list_commands(None))
def test_help_spells_every_default_and_whole_number_alike(command):
    """As click writes them: a sentence, two spaces, and the default in brackets."""
    context = click.Context(command_line, info_name="gemma3-export")
    for option in command_line.get_command(context, command).get_params(context):
        shown = option.get_help_record(context)
        if shown is None:  # an argument
            continue
        names, text = shown
        assert "INTEGER" not in names
        if "default:" in text:
            assert re.fullmatch(r"[^\[]+\.  \[default: [^\[\]]+\]", text), text


def test_training_without_weights_or_a_size_is_rejected(tmp_path):
    """A forgotten ``--weights`` must not train a small random model for 2000 steps."""
    message = run_rejected("train", tmp_path / "tokens", "-o", tmp_path / "run")
    assert "--weights SRC to fine-tune" in message
    assert "--size demo" in message


def test_help_imports_nothing_heavy():
    """Imports decide how long ``--help`` takes, and unlike seconds they can be compared."""
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "tokenizers", "numpy"}
    light = {"huggingface_hub", "safetensors", "tqdm", "tiktoken", "rich", "jinja2"}
    assert not loaded_modules("--help") & (heavy | light)


def test_generate_imports_no_torch(ort_bundle):
    modules = loaded_modules("generate", ort_bundle, "--prompt", "a", "--max-new-tokens", 2)
    assert "onnxruntime" in modules
    assert not modules & {"torch", "transformers", "onnx"}


def test_inspect_imports_no_torch(ort_bundle):
    modules = loaded_modules("inspect", ort_bundle)
    assert not modules & {"torch", "transformers", "onnxruntime"}


def test_version():
    assert __version__ in run_ok("--version").output


def test_choices_are_those_of_the_exporters():
    from gemma3_export.api.opening import RUNTIMES as BACKENDS
    from gemma3_export.exporters.onnx.trace import TARGETS as TRACER_TARGETS

    assert tuple(TRACER_TARGETS) == ONNX_TARGETS
    assert BACKENDS == RUNTIMES


def test_missing_packages_are_named(output, monkeypatch):
    monkeypatch.setattr(verifying, "PACKAGES", ("torch", "no_such_package"))
    message = error_line("onnx", "--random-weights", 1, "--size", "270m", "-o", output, code=3)
    assert "no_such_package" in message
    assert "pip install" in message


def test_debug_shows_the_traceback(tmp_path):
    result = run("--debug", "inspect", tmp_path)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_cuda_options_without_effect_are_rejected(ort_bundle):
    assert "--cuda-placement" in run_rejected("inspect", ort_bundle, "--cuda-python", "/bin/true")
    for option in (["--cuda-graph"], ["--tf32"], ["--gpu-memory-limit", "1GB"]):
        for command in (["generate", "--prompt", "a"], ["verify"], ["bench"]):
            message = run_rejected(command[0], ort_bundle, *command[1:], "--device", "cpu", *option)
            assert f"{option[0]} has no effect on the CPU" in message


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_absent_cuda_is_never_skipped_silently(ort_bundle, command):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    prompt = ("--prompt", "a") if command == "generate" else ()
    message = error_line(command, ort_bundle, *prompt, "--device", "cuda", code=3)
    assert "CUDA" in message


def test_a_long_stage_reports_its_progress_every_half_minute(monkeypatch, capsys):
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


def test_an_error_is_one_line_whatever_a_name_in_a_file_contains(tmp_path):
    name = "\x1b[2Jred\r\nsecond line\x00" + "x" * 50_000
    header = json.dumps({name: {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    message = error_line("to-hf", "--weights", tmp_path, "-o", tmp_path / "out")
    assert r"\x1b[2Jred\r\nsecond line\x00xxx" in message
    assert message.rstrip("\n").isprintable()
    assert len(message) < 3500
    assert message.endswith("download the file again\n")  # the remedy


def test_a_lack_of_memory_is_one_line(monkeypatch, tmp_path):
    def exhausted(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("gemma3_export.api.exporting.open_weights", exhausted)
    message = error_line("to-hf", "--weights", tmp_path, "-o", tmp_path / "out", code=1)
    assert "out of memory" in message
