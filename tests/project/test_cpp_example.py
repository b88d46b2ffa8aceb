"""The C++ program in ``examples/cpp`` generates the same tokens as our own loop."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime
from tests.support.generation import generate
from tests.support.tiny_models import tiny_config

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
PROMPT = [2, 30, 31, 32, 33, 34, 35, 36, 37]  # longer than the window of 6
NEW_TOKENS = 16

pytestmark = pytest.mark.slow  # libtorch's headers take half a minute to compile


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Build the program and return its path."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    quick = "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -Werror"
    configured = run("cmake", "-S", SOURCE, "-B", build, prefix, quick)
    if torch.version.cuda and "CUDA cannot be found" in configured.stdout + configured.stderr:
        pytest.skip("this torch wheel is built for CUDA, and CMake finds no CUDA toolkit")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = run("cmake", "--build", build)
    assert built.returncode == 0, built.stdout + built.stderr
    return build / "generate"


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def bundle(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / request.param
    writer = TorchScriptWriter(dtype=request.param, block_size=16)
    return export_bundle(RandomSource(tiny_config(), 11), path, writer).path


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def run_program(program: Path, bundle: Path, *options: object, prompt=PROMPT):
    ids = ",".join(map(str, prompt))
    return run(program, bundle / "torchscript" / "model.ts", ids, *options)


def ids_of(done: subprocess.CompletedProcess[str]) -> tuple[int, ...]:
    assert done.returncode == 0, done.stderr
    return tuple(int(part) for part in done.stdout.strip().split(","))


def expected(bundle: Path, prompt: list[int], new_tokens: int) -> tuple[int, ...]:
    runtime = TorchScriptRuntime(bundle, device="cpu")
    (completion,) = generate(
        runtime, [prompt], SamplingParams(), max_new_tokens=new_tokens
    ).collect()
    return completion.token_ids


def test_continues_a_prompt_like_our_own_loop(program, bundle):
    done = run_program(program, bundle, "--new-tokens", NEW_TOKENS)
    assert ids_of(done) == expected(bundle, PROMPT, NEW_TOKENS)
    assert "prefill 9 tokens" in done.stderr
    assert "decode 15 tokens" in done.stderr


def test_prefills_in_chunks(program, bundle):
    done = run_program(program, bundle, "--new-tokens", NEW_TOKENS, "--prefill-chunk", 4)
    assert ids_of(done) == expected(bundle, PROMPT, NEW_TOKENS)


def test_stops_at_the_end_tokens_of_the_config(program, tmp_path):
    source = RandomSource(tiny_config(eos_token_id=(1,)), 11)
    never = export_bundle(source, tmp_path / "never", TorchScriptWriter()).path
    second = expected(never, PROMPT, 2)[1]
    source = RandomSource(tiny_config(eos_token_id=(1, second)), 11)
    stops = export_bundle(source, tmp_path / "stops", TorchScriptWriter()).path
    found = ids_of(run_program(program, stops, "--new-tokens", NEW_TOKENS))
    assert found == expected(stops, PROMPT, NEW_TOKENS)
    assert len(found) <= 2


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ((), [2, 97], "token id 97"),
        (("--new-tokens", "-1"), PROMPT, "--new-tokens"),
        (("--new-tokens", "0"), PROMPT, "--new-tokens"),
        (("--new-tokens", "1000"), PROMPT, "context"),
        (("--new-tokens",), PROMPT, "needs a value"),
        (("--color", "red"), PROMPT, "--color"),
    ],
)
def test_bad_arguments_exit_with_2(program, bundle, options, prompt, message):
    done = run_program(program, bundle, *options, prompt=prompt)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_a_damaged_archive_exits_with_1(program, bundle, tmp_path):
    whole = (bundle / "torchscript" / "model.ts").read_bytes()
    damaged = tmp_path / "torchscript" / "model.ts"
    damaged.parent.mkdir()
    damaged.write_bytes(whole[:1000])
    done = run_program(program, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_absent_cuda_is_an_error(program, bundle):
    done = run_program(program, bundle, "--device", "cuda")
    assert done.returncode == 1
    assert "no GPU" in done.stderr
