"""``onnx``, ``torchscript`` and ``pt2``: what they print, and the input and output they reject."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from gemma3_export.bundle import Bundle
from tests.support.command_line import RANDOM_EXPORT, error_line, run, run_ok, run_rejected
from tests.support.exported_bundles import edit_json
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer


def test_onnx_exports_and_reports_that_parity_passed(one_layer, tmp_path):
    tiny_gemma_tokenizer(300).save(tmp_path / "tokenizer")
    config = json.loads(one_layer.read_text(encoding="utf-8")) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = run_ok(
        *("onnx", "--config", tmp_path / "config.json", "--random-weights", 1),
        *("--tokenizer", tmp_path / "tokenizer", "-o", tmp_path / "an export"),
    )
    assert "parity: passed" in result.stdout
    assert f"next: gemma3-export generate '{tmp_path / 'an export'}' --prompt" in result.stdout
    assert Bundle(tmp_path / "an export").graph("onnx").verified
    # One line per stage and no progress bar, because stderr is not a terminal.
    stages = result.stderr.splitlines()
    first = ("hashing the source", "tracing", "writing weights", "opening the runtime")
    assert stages[:4] == [f"{stage} ..." for stage in first]
    assert stages[4] == "computing expected values ..."
    assert stages[5].startswith("comparing ")
    assert all(line.endswith(" ...") for line in stages)
    assert len(stages) < 10


def test_an_export_without_the_check_is_marked_as_not_checked(one_layer, tmp_path):
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


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_with_other_files_is_left_alone(tiny_folder, tmp_path, force):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious", encoding="utf-8")
    message = error_line("onnx", "--weights", tiny_folder, "-o", output, *force)
    assert "choose another output" in message
    assert (output / "mine.txt").read_text(encoding="utf-8") == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", [".", "..", "../here"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_current_folder_is_not_replaced(tiny_folder, tmp_path, monkeypatch, name, force):
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "mine.txt").write_text("precious", encoding="utf-8")
    monkeypatch.chdir(here)
    message = error_line("onnx", "--weights", tiny_folder, "--no-verify", "-o", name, *force)
    assert "is or contains the current folder" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "mine.txt"]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("arguments", [(".",), ("..", "--force")])
def test_the_current_folder_is_not_replaced(one_layer, tmp_path, monkeypatch, arguments):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "current folder" in error_line(*RANDOM_EXPORT, one_layer, "-o", *arguments)
    assert Path.cwd().samefile(tmp_path / "here")


def test_an_existing_bundle_is_rejected_before_weights_are_opened(ort_bundle):
    assert "--force" in error_line("onnx", "--weights", "no/such-model", "-o", ort_bundle)


def test_pt2_does_not_offer_int8(tiny_folder, output):
    assert "'int8' is not one of" in run_rejected(
        "pt2", "--weights", tiny_folder, "--dtype", "int8", "-o", output
    )


@pytest.mark.parametrize(
    ("command", "options", "option"),
    [
        ("torchscript", ("--dtype", "bf16", "--block-size", "32"), "--block-size"),
        ("torchscript", ("--block-size", "128"), "--block-size"),  # the default, but given
        ("onnx", ("--block-size", "32"), "--block-size"),
        ("onnx", ("--dtype", "bf16", "--block-size", "32"), "--block-size"),
        ("onnx", ("--dtype", "fp16", "--block-size", "32"), "--block-size"),
        ("onnx", ("--dtype", "keep", "--block-size", "64"), "--block-size"),
    ],
)
def test_export_options_without_effect_are_rejected(one_layer, output, command, options, option):
    arguments = ("--random-weights", 0, "--config", one_layer, "-o", output)
    message = run_rejected(command, *arguments, *options)
    assert f"{option} would have no effect" in message


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--size", "3b"),
        ("--weights", "270m"),
        ("--weights", "no/such/file.gguf"),
        ("--weights", "x\0y"),
        ("--random-weights", "1"),
        ("--random-weights", "1", "--size", "270m", "--target", "tpu"),
        ("--random-weights", "1", "--size", "270m", "--dtype", "fp8"),
        ("--random-weights", "1", "--size", "270m", "--weights", "a/b"),
        ("--random-weights", "1", "--config", "no-such.json"),
        ("--random-weights", "1", "--size", "270m", "--calibration", "text.txt"),
    ],
)
def test_invalid_sources_are_rejected(output, arguments):
    run_rejected("onnx", *arguments, "-o", output)


def test_the_tokenizer_of_another_model_is_rejected(tiny_folder, output, tmp_path):
    tiny_gemma_tokenizer(700).save(tmp_path / "other")
    message = error_line(
        *("onnx", "--weights", tiny_folder, "--tokenizer", tmp_path / "other", "-o", output)
    )
    assert "700" in message
    assert "400" in message


def test_a_config_that_disagrees_with_the_weights_is_rejected(tmp_path, output):
    write_hf_folder(tmp_path / "weights", tiny_config())
    edit_json(tmp_path / "weights/config.json", intermediate_size=96)
    message = run_rejected("onnx", "--weights", tmp_path / "weights", "-o", output)
    assert "model.layers.4.mlp" not in message  # the rest are only counted
    assert "(80, 48), the config needs (96, 48)" in message


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def test_code_in_a_pickle_does_not_run(tmp_path, output):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": Malicious(tmp_path / "pwned")}))
    run_rejected("onnx", "--size", "270m", "--weights", tmp_path / "model.pt", "-o", output)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6])
def test_truncated_weights_are_rejected(tmp_path, output, keep):
    write_hf_folder(tmp_path / "weights", tiny_config())
    path = tmp_path / "weights/model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "model.safetensors" in error_line(
        "onnx", "--weights", tmp_path / "weights", "-o", output
    )


@pytest.mark.parametrize(
    ("arguments", "dtypes"),
    [((), ("fp32", "int8")), (("--dtype", "int8"), ("int8",))],
)
def test_for_web_selects_target_and_dtypes(arguments, dtypes, monkeypatch):
    requested = {}

    def record(options, runtime, variants, description, export):
        requested.update(export.keywords, variants=variants)

    monkeypatch.setattr("gemma3_export.cli.onnx_command.run_export", record)
    run_ok("onnx", "--size", "270m", "-o", "out", "--for", "web", *arguments)
    assert (requested["target"], requested["dtype"]) == ("web", dtypes)
    assert requested["variants"] == list(dtypes)


@pytest.mark.parametrize("option", [("--target", "ort"), ("--block-size", "32")])
def test_for_web_rejects_options_that_it_decides(option):
    message = run_rejected("onnx", "--size", "270m", "-o", "out", "--for", "web", *option)
    assert f"{option[0]} would have no effect" in message
