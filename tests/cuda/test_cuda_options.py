"""The command line's CUDA options, and what they do without CUDA."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from gemma3_export.api import model_runtimes
from gemma3_export.api import verification as verifying
from gemma3_export.bench import run as benchmark
from gemma3_export.bench import worker as benchmark_worker
from gemma3_export.bench.worker import RuntimeCandidate, open_candidate
from gemma3_export.bundle import Bundle
from gemma3_export.cli import command_line
from gemma3_export.cli.options import CudaRequest, memory_size
from gemma3_export.cuda import doctor
from gemma3_export.cuda.doctor import Report
from gemma3_export.cuda.facts import Driver, Facts, Gpu, Machine, Packages, Trial
from gemma3_export.cuda.problems import Problem
from gemma3_export.cuda.stub import cuda_environment
from gemma3_export.device import CudaOptions, gpu_count
from gemma3_export.errors import InputError
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime, settle_capture
from tests.support.cuda_python import REPOSITORY, cuda_python

COMMANDS = {
    "generate": ("--prompt", "a", "--max-new-tokens", "2"),
    "verify": (),
    "bench": ("--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1"),
}
ALL = ("--cuda-graph", "--tf32", "--gpu-memory-limit", "2GB")
WANTED = CudaOptions(graph=True, tf32=True, memory_limit_bytes=2 * 10**9)


def run(command: str, bundle: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command_line, [command, str(bundle), *COMMANDS[command], *arguments])


class ReachedError(Exception):
    """Carries what a command would open."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what would reach the runtime; nothing is opened."""
    found: dict[str, Any] = {}

    def opened(bundle: object, runtime: str, **options: Any) -> None:
        found.update(options, runtime=runtime)
        raise ReachedError

    def started(name: str, asked: dict[str, Any]) -> None:
        cuda = CudaOptions(**asked["cuda"]) if "cuda" in asked else None
        found.update(device=asked["device"], cuda=cuda, runtime=name)
        raise ReachedError

    monkeypatch.setattr(model_runtimes, "open_runtime", opened)
    monkeypatch.setattr(verifying, "open_runtime", opened)
    monkeypatch.setattr(benchmark, "own_worker", started)
    return found


def examined(monkeypatch: pytest.MonkeyPatch, *, is_usable: bool, gpus: int = 1) -> list[str]:
    """Have the doctor find this, and return the requests that it gets."""
    devices = []

    def examine(device: str, runtime: str) -> Report:
        devices.append(f"{runtime} on {device}")
        facts = Facts(
            device=device,
            runtime=runtime,
            machine=Machine(python="3", executable="p", system="Linux", architecture="x86_64"),
            packages=Packages(),
            driver=Driver(is_found=True, gpus=tuple(Gpu(index=index) for index in range(gpus))),
            trial=Trial(framework="f", is_right=is_usable),
        )
        broken = Problem(what="cuBLAS is missing", fix="pip install it")
        return Report(facts=facts, problems=() if is_usable else (broken,))

    monkeypatch.setattr(doctor, "examine", examine)
    return devices


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_options_reach_the_runtime(
    ort_bundle: Path, asked: dict[str, Any], command: str, device: str
) -> None:
    result = run(command, ort_bundle, "--device", device, *ALL)
    assert isinstance(result.exception, ReachedError), result.output
    assert asked["cuda"] == WANTED
    assert asked["device"] == device
    assert asked["runtime"] == "onnx"


@pytest.mark.parametrize("command", COMMANDS)
def test_without_options_the_runtime_chooses(
    ort_bundle: Path, asked: dict[str, Any], command: str
) -> None:
    result = run(command, ort_bundle)
    assert isinstance(result.exception, ReachedError), result.output
    assert asked["cuda"] is None
    assert asked["device"] == "auto"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cuda_graph_can_be_refused(ort_bundle: Path, asked: dict[str, Any], command: str) -> None:
    result = run(command, ort_bundle, "--no-cuda-graph")
    assert isinstance(result.exception, ReachedError), result.output
    assert asked["cuda"] == CudaOptions(graph=False)


@pytest.mark.parametrize(
    ("asked", "target", "captures"),
    [(None, "ort", True), (False, "ort", False), (None, "portable", False)],
)
def test_decode_steps_are_captured_unless_it_is_impossible_or_refused(
    asked: bool | None, target: str, captures: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settled = settle_capture(CudaOptions(graph=asked, tf32=True), target)
    assert settled == CudaOptions(graph=captures, tf32=True)
    said = "no CUDA graph can be captured" in caplog.text
    assert said == (target == "portable")


def test_a_cuda_graph_of_a_cache_that_grows_is_rejected() -> None:
    with pytest.raises(InputError, match="export without --target"):
        settle_capture(CudaOptions(graph=True), "portable")


def test_a_draft_model_is_opened_like_the_model(
    ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = model_runtimes.open_runtime

    def observed(bundle: Any, runtime: str, **options: Any) -> Any:
        opened.append(options.get("cuda"))
        return original(bundle, runtime, **options | {"device": "cpu"})

    monkeypatch.setattr(model_runtimes, "open_runtime", observed)
    result = run("generate", ort_bundle, "--draft-model", str(ort_bundle), "--tf32")
    assert result.exit_code == 0, result.output
    assert opened == [CudaOptions(tf32=True)] * 2


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", [*ALL[:2], "--gpu-memory-limit=1GB", "--cpu-fallback"])
def test_options_without_effect_on_the_cpu_are_rejected(
    ort_bundle: Path, command: str, option: str
) -> None:
    result = run(command, ort_bundle, "--device", "cpu", option)
    assert result.exit_code == 2
    assert f"{option.partition('=')[0]} has no effect on the CPU" in result.stderr


@pytest.mark.parametrize("option", [*ALL[:2], "--gpu-memory-limit=1GB"])
def test_options_of_onnx_runtime_are_rejected_elsewhere(ort_bundle: Path, option: str) -> None:
    result = run("generate", ort_bundle, "--runtime", "reference", "--device", "cuda", option)
    assert result.exit_code == 2
    assert "not for the reference runtime" in result.stderr


def test_torchscript_takes_a_cuda_graph_and_nothing_else() -> None:
    asked = {"tf32": False, "gpu_memory_limit": None, "cpu_fallback": False}
    request = CudaRequest(cuda_graph=True, **asked)
    assert request.settle("cuda", "torchscript") == ("cuda", CudaOptions(graph=True))
    with pytest.raises(click.UsageError, match="onnx and torchscript, not for the pt2 runtime"):
        request.settle("cuda", "pt2")
    with pytest.raises(click.UsageError, match="--tf32 is for onnx, not for the torchscript"):
        CudaRequest(cuda_graph=True, **(asked | {"tf32": True})).settle("cuda", "torchscript")


def test_auto_without_a_gpu_leaves_the_options_without_effect(ort_bundle: Path) -> None:
    if gpu_count():
        pytest.skip("this machine has a GPU")
    result = run("generate", ort_bundle, *ALL)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8gib", 8 * 2**30),
        ("1.5 GB", 15 * 10**8),
        ("512MiB", 2**29),
        ("7", 7),
        ("3 kB", 3000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "-1GB", "0", "0.1", "nan", "1e400", "8GB8"])
def test_impossible_sizes(ort_bundle: Path, text: str) -> None:
    with pytest.raises(click.BadParameter):
        memory_size(text)
    result = run("generate", ort_bundle, f"--gpu-memory-limit={text}")
    assert result.exit_code == 2
    assert repr(text) in result.stderr
    assert "8GB" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_fallback_is_opt_in_and_prints_a_warning(
    ort_bundle: Path, asked: dict[str, Any], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = examined(monkeypatch, is_usable=False)
    result = run(command, ort_bundle, "--device", "cuda:1", "--cpu-fallback", *ALL)
    assert isinstance(result.exception, ReachedError), result.output
    assert devices == ["onnx on cuda:1"]
    assert (asked["device"], asked["cuda"]) == ("cpu", None)
    stages = ("hashing the bundle ...", "opening the runtime ...")
    (line,) = (line for line in result.stderr.splitlines() if line not in stages)
    assert line == (
        "warning: cuda:1 cannot be used, so this runs on the CPU (--cpu-fallback): "
        "cuBLAS is missing; fix: pip install it"
    )


def test_a_usable_gpu_needs_no_fallback(
    ort_bundle: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    examined(monkeypatch, is_usable=True)
    result = run("generate", ort_bundle, "--device", "cuda:1", "--cpu-fallback", *ALL)
    assert isinstance(result.exception, ReachedError)
    assert (asked["device"], asked["cuda"]) == ("cuda:1", WANTED)
    assert result.stderr == ""


@pytest.mark.parametrize(("gpus", "is_told"), [(0, False), (1, True)])
def test_auto_falls_back_and_warns_where_there_is_a_gpu(
    ort_bundle: Path,
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    is_told: bool,
) -> None:
    examined(monkeypatch, is_usable=False, gpus=gpus)
    result = run("generate", ort_bundle, "--device", "auto", "--cpu-fallback")
    assert isinstance(result.exception, ReachedError)
    assert asked["device"] == "cpu"
    assert result.stderr.startswith("warning: ") == is_told


def test_a_real_fallback_generates_on_the_cpu(ort_bundle: Path) -> None:
    """Whatever is missing on this machine, it has no 64th GPU."""
    arguments = ("--device", "cuda:63", "--json")
    refused = run("generate", ort_bundle, *arguments)
    assert refused.exit_code == 3
    assert refused.stdout == ""
    assert "gemma3-export doctor" in refused.stderr
    result = run("generate", ort_bundle, *arguments, "--cpu-fallback", "--cuda-graph")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["token_ids"]) <= 2
    assert re.match(r"warning: cuda:63 cannot be used, so this runs on the CPU", result.stderr)
    assert "fix: " in result.stderr


def test_bench_decodes_as_generate_does(ort_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes candidates from the device if there are any, and gets the same tokens."""
    prompt = np.array([[2, 5, 9, 3], [2, 8, 4, 7]])
    candidate = open_candidate("onnx", Bundle(ort_bundle), "cpu", 1)
    assert isinstance(candidate, RuntimeCandidate)
    _, _, expected = candidate.run(prompt, 12)
    assert isinstance(candidate.runtime, OnnxRuntime)
    candidate.runtime.decodes_on_device = True
    chosen = []
    original = benchmark_worker.most_likely
    monkeypatch.setattr(
        benchmark_worker, "most_likely", lambda row: chosen.append(row) or original(row)
    )
    _, _, tokens = candidate.run(prompt, 12)
    assert tokens.tolist() == expected.tolist()
    assert len(chosen) == 24
    assert {type(row).__name__ for row in chosen} == {"Candidates"}


def over_the_stub(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that finds a GPU that computes nothing."""
    python = cuda_python()
    with cuda_environment(python) as environment:
        return subprocess.run(
            [str(python), "-m", "gemma3_export", *map(str, arguments)],
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )


@pytest.mark.placement
@pytest.mark.parametrize("options", [(), ("--cuda-graph",)], ids=["launches", "CUDA graph"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_over_the_stub_stderr_holds_our_own_line_only(
    device: str, options: tuple[str, ...]
) -> None:
    """onnxruntime-gpu 1.31 warns for each session that no plugin is registered for the device."""
    from tests.exporters.test_half_precision import half_bundle

    prompt = ("--prompt-ids", "2,5,9", "--max-new-tokens", 3)
    done = over_the_stub("generate", half_bundle("bf16"), *prompt, "--device", device, *options)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("load ")


@pytest.mark.placement
def test_over_the_stub_errors_of_onnx_runtime_are_still_reported() -> None:
    from tests.exporters.test_half_precision import half_bundle

    prompt = ("--prompt-ids", "2,5,9", "--device", "cuda", "--gpu-memory-limit", "1000")
    done = over_the_stub("generate", half_bundle("bf16"), *prompt)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ONNX Runtime cannot load")
    assert "Available memory of 512 is smaller than requested" in done.stderr


@pytest.mark.placement
def test_over_the_stub_the_provider_gets_the_options(ort_bundle: Path) -> None:
    """bench shows what its process opened. Half precision, since CUDA has no float32 kernel."""
    from tests.exporters.test_half_precision import half_bundle

    options = [*ALL, "--device", "cuda:1", "--json", "--threads", "1"]
    done = over_the_stub("bench", half_bundle("bf16"), *COMMANDS["bench"], *options)
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout)["candidates"]["onnx"]["describe"]
    assert described["device"] == "cuda:1"
    assert described["cuda"]["graph"] is described["cuda"]["tf32"] is True
    assert described["cuda"]["memory_limit_bytes"] == 2 * 10**9
