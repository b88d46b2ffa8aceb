"""Bad input, full disks and interruptions: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gemma3_export.api import verification as verifying
from gemma3_export.cli import command_line
from gemma3_export.exporters import bundle_writer as bundle_export
from gemma3_export.exporters.onnx.external_data import HashingWriter
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

REPOSITORY = Path(__file__).parents[2]
RANDOM = ("onnx", "--random-weights", 1, "--config")  # the config follows
BUNDLE_FILES = (
    "config.json",
    "generation_config.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model_windowed.onnx",
    "parity.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 2) -> str:
    """Run a command that must end with ``code`` and one line; return the line."""
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def error_line(*arguments: object, code: int = 2) -> str:
    lines = refused(*arguments, code=code).splitlines(keepends=True)
    message = "".join(line for line in lines if not line.endswith(" ...\n"))  # the stages so far
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


@pytest.fixture
def copied_bundle(ort_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(ort_bundle, tmp_path / "bundle"))


@pytest.fixture
def output(tmp_path) -> Iterator[Path]:
    """An output folder; when the test ends, neither it nor a staging folder may be there."""
    parent = tmp_path / "outputs"
    parent.mkdir()
    yield parent / "out"
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_that_is_not_ours_is_left_alone(tiny_folder, tmp_path, force):
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


def test_pt2_offers_no_dtype_that_it_refuses(tiny_folder, output):
    assert "'int8' is not one of" in refused(
        "pt2", "--weights", tiny_folder, "--dtype", "int8", "-o", output
    )


def test_existing_bundle_is_refused_before_weights_are_opened(ort_bundle):
    assert "--force" in error_line("onnx", "--weights", "no/such-model", "-o", ort_bundle)


def test_full_disk_half_way_leaves_nothing(one_layer, output, monkeypatch):
    write = HashingWriter.write

    def write_until_full(self, data):
        if self.position > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(HashingWriter, "write", write_until_full)
    message = error_line(*RANDOM, one_layer, "-o", output, code=1)
    assert "No space left" in message


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 80 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_leaves_nothing(one_layer, small_disk, monkeypatch):
    arguments = (*RANDOM, one_layer, "-o", small_disk / "out")
    assert "GB left" in error_line(*arguments, code=1)  # seen before anything is written
    monkeypatch.setattr(bundle_export, "require_space", lambda *_: None)
    assert "No space left" in error_line(*arguments, code=1)
    assert list(small_disk.iterdir()) == []


LIMITED_EXPORT = """
import resource
from gemma3_export.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main()
"""
SLOW_EXPORT = """
import sys, time
from gemma3_export.exporters.onnx.external_data import HashingWriter
write = HashingWriter.write
def slow_write(self, data):
    write(self, data)
    self.file.flush()
    print("writing", flush=True)
    time.sleep(60)
HashingWriter.write = slow_write
from gemma3_export.cli import main
main()
"""
SLOW_GENERATION = """
import time
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
step = OnnxRuntime.step
def slow_step(self, ids, cache, **options):
    time.sleep(0.1)
    return step(self, ids, cache, **options)
OnnxRuntime.step = slow_step
from gemma3_export.cli import main
main()
"""


def start(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("command", ["onnx", "torchscript", "pt2"])
def test_a_file_that_may_not_grow_so_large_leaves_nothing(one_layer, output, command):
    process = start(LIMITED_EXPORT, command, *RANDOM[1:], one_layer, "-o", output, "--no-verify")
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1, complaint
    assert b"no partial output is left: [Errno 27] File too large" in complaint


@pytest.mark.parametrize("arguments", [(".",), ("..", "--force")])
def test_the_current_folder_is_not_replaced(one_layer, tmp_path, monkeypatch, arguments):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "current folder" in error_line(*RANDOM, one_layer, "-o", *arguments)
    assert Path.cwd().samefile(tmp_path / "here")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_while_writing_weights_leaves_nothing(one_layer, output, number, code):
    process = start(SLOW_EXPORT, *RANDOM, one_layer, "-o", output)
    assert process.stdout.readline() == b"writing\n"
    assert any(output.parent.rglob("model.onnx_data"))
    process.send_signal(number)
    process.send_signal(number)  # an impatient second one changes nothing
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"Traceback" not in complaint


def test_interrupted_generation_keeps_what_there_is(ort_bundle):
    process = start(
        *(SLOW_GENERATION, "generate", ort_bundle, "--prompt", "hello", "--json"),
        *("--max-new-tokens", 200),
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, complaint = process.communicate(timeout=30)
    assert process.returncode == 130
    completion = json.loads(out)
    assert completion["finish_reason"] == "cancelled"
    assert 0 < len(completion["token_ids"]) < 200
    assert b"Traceback" not in complaint


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_prompt(ort_bundle, text):
    assert "prompt 1 is empty" in error_line("generate", ort_bundle, "--prompt", text)


def test_no_prompt_at_all(ort_bundle):
    assert "--prompt" in refused("generate", ort_bundle)


def test_prompt_longer_than_the_context(ort_bundle):
    message = error_line("generate", ort_bundle, "--prompt", "z" * 300)
    assert "256" in message


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
        ("--seed", "-1"),
    ],
)
def test_impossible_sampling_values(ort_bundle, option, value):
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
def test_impossible_options(ort_bundle, arguments):
    refused("generate", ort_bundle, "--prompt", "a", *arguments)


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
def test_export_options_without_effect_are_refused(one_layer, output, command, options, option):
    arguments = ("--random-weights", 0, "--config", one_layer, "-o", output)
    message = refused(command, *arguments, *options)
    assert f"{option} would have no effect" in message


def test_cuda_options_without_effect_are_refused(ort_bundle):
    assert "--cuda-placement" in refused("inspect", ort_bundle, "--cuda-python", "/bin/true")
    for option in (["--cuda-graph"], ["--tf32"], ["--gpu-memory-limit", "1GB"]):
        for command in (["generate", "--prompt", "a"], ["verify"], ["bench"]):
            message = refused(command[0], ort_bundle, *command[1:], "--device", "cpu", *option)
            assert f"{option[0]} has no effect on the CPU" in message


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_absent_cuda_is_never_skipped_silently(ort_bundle, command):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    prompt = ("--prompt", "a") if command == "generate" else ()
    message = error_line(command, ort_bundle, *prompt, "--device", "cuda", code=3)
    assert "CUDA" in message


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_tampered_file_is_named(copied_bundle, name):
    path = copied_bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert name in error_line("verify", copied_bundle)
    assert name in error_line("inspect", copied_bundle, "--check")


def test_bundle_files_are_all_tampered_with(ort_bundle):
    found = {path.relative_to(ort_bundle).as_posix() for path in ort_bundle.rglob("*.*")}
    assert found == {*BUNDLE_FILES, "manifest.json"}


def test_missing_file_is_named(copied_bundle):
    (copied_bundle / "onnx/model.onnx_data").unlink()
    for command in (("inspect",), ("generate", "--prompt", "a"), ("verify",)):
        assert "onnx/model.onnx_data" in error_line(command[0], copied_bundle, *command[1:])


def edit_json(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(data), encoding="utf-8")


def test_changed_manifest(copied_bundle):
    files = json.loads((copied_bundle / "manifest.json").read_text(encoding="utf-8"))["files"]
    files["tokenizer.json"]["sha256"] = "0" * 64
    edit_json(copied_bundle / "manifest.json", files=files)
    assert "tokenizer.json" in error_line("verify", copied_bundle)
    (copied_bundle / "manifest.json").write_text("{", encoding="utf-8")
    assert "manifest.json" in error_line("inspect", copied_bundle)


def test_newer_format_version(copied_bundle):
    edit_json(copied_bundle / "manifest.json", format_version=99)
    for command in (("inspect",), ("generate", "--prompt", "a"), ("verify",)):
        message = error_line(command[0], copied_bundle, *command[1:])
        assert "99" in message
        assert "upgrade" in message


def test_no_bundle_at_all(tmp_path):
    assert "not a gemma3-export bundle" in error_line("inspect", tmp_path / "nothing")


def test_tokenizer_of_another_model(tiny_folder, output, tmp_path):
    tiny_gemma_tokenizer(700).save(tmp_path / "other")
    message = error_line(
        *("onnx", "--weights", tiny_folder, "--tokenizer", tmp_path / "other", "-o", output)
    )
    assert "700" in message
    assert "400" in message


def test_config_that_disagrees_with_the_weights(tmp_path, output):
    write_hf_folder(tmp_path / "weights", tiny_config())
    edit_json(tmp_path / "weights/config.json", intermediate_size=96)
    message = refused("onnx", "--weights", tmp_path / "weights", "-o", output)
    assert "model.layers.4.mlp" not in message  # many problems are counted, not all shown
    assert "(80, 48), the config needs (96, 48)" in message


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def test_pickle_with_code_in_it(tmp_path, output):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": Malicious(tmp_path / "pwned")}))
    refused("onnx", "--size", "270m", "--weights", tmp_path / "model.pt", "-o", output)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6])
def test_truncated_weights(tmp_path, output, keep):
    write_hf_folder(tmp_path / "weights", tiny_config())
    path = tmp_path / "weights/model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "model.safetensors" in error_line(
        "onnx", "--weights", tmp_path / "weights", "-o", output
    )


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
def test_impossible_sources(output, arguments):
    refused("onnx", *arguments, "-o", output)


def test_missing_packages_are_named(output, monkeypatch):
    monkeypatch.setattr(verifying, "PACKAGES", ("torch", "no_such_package"))
    message = error_line("onnx", "--random-weights", 1, "--size", "270m", "-o", output, code=3)
    assert "no_such_package" in message
    assert "pip install" in message


def test_debug_shows_the_traceback(tmp_path):
    result = run("--debug", "inspect", tmp_path)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
