"""``gemma3-export doctor`` names what is broken, and the command that fixes it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gemma3_export.cli import command_line
from gemma3_export.cuda import doctor as report
from gemma3_export.cuda.doctor import examine
from gemma3_export.cuda.facts import Driver, Facts, Gpu, Library, Machine, Packages, Trial
from gemma3_export.cuda.libraries import needed_libraries
from gemma3_export.cuda.problems import problems_of
from gemma3_export.cuda.stub import cuda_environment
from tests.support.cuda_python import REPOSITORY, cuda_python
from tests.support.fake_cuda import FakeCuda, compile_library

EXTRA = 'pip install "gemma3-export[cuda]"'
BOTH = f"pip uninstall -y onnxruntime onnxruntime-gpu && {EXTRA}"
GPU = Gpu(index=0, name="Fake GPU", compute_capability=(8, 6), memory_bytes=24 * 10**9)
CRASHES = "__attribute__((constructor)) void crash(void) { *(volatile int *)0 = 0; }"
CUBLAS, CUDART = "libcublas.so.13", "libcudart.so.13"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    machine = Machine(
        python="3.13.1",
        executable="python",
        system="Linux",
        architecture="x86_64",
        nvidia_devices=1,
    )
    monkeypatch.setattr(report, "read_machine", lambda: machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return FakeCuda(tmp_path, monkeypatch)


def doctor(*arguments: str) -> Result:
    result = CliRunner().invoke(command_line, ["doctor", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def blocking_problems(*arguments: str, code: int = 3) -> list[dict[str, Any]]:
    """Run the doctor, which must exit with ``code``, and return the problems that block."""
    result = doctor(*arguments, "--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    assert found["usable"] == (code == 0)
    return [problem for problem in found["problems"] if problem["blocks"]]


def test_a_working_gpu_is_usable(fake: FakeCuda) -> None:
    fake.onnxruntime_gpu(CUBLAS, CUDART)
    fake.wheel("nvidia-cublas", "13.1.0", CUBLAS)
    fake.wheel("nvidia-cuda-runtime", "13.0.9", CUDART)
    fake.driver(count=2)
    result = doctor("--device", "cuda:1")
    assert result.exit_code == 0, result.output
    assert "onnxruntime-gpu 1.31.1, built for CUDA 13.0" in result.stdout
    assert "supports CUDA up to 13.0, 2 GPUs" in result.stdout
    assert "cuda:1: Fake GPU, compute capability 8.6, 24.0 GB" in result.stdout
    assert f"{CUBLAS}: {fake.packages}/nvidia/cu13/lib/{CUBLAS}" in result.stdout
    assert result.stdout.endswith("cuda:1: usable\n")
    assert "problem: " not in result.stdout


def test_a_missing_library_and_its_package(fake: FakeCuda) -> None:
    fake.onnxruntime_gpu(CUBLAS, CUDART)
    fake.wheel("nvidia-cuda-runtime", "13.0.9", CUDART)
    fake.driver()
    found = {library.soname: library for library in examine("cuda").facts.libraries}
    assert found[CUDART].problem is None
    assert found[CUBLAS].problem is not None
    facts = replace(examine("cuda").facts, trial=Trial(framework="onnxruntime"))
    (problem,) = [one for one in problems_of(facts) if one.blocks]
    assert f"{CUBLAS} (from the package nvidia-cublas)" in problem.what
    assert CUDART not in problem.what
    assert problem.fix == EXTRA


@pytest.mark.parametrize("is_crash", [False, True])
def test_a_damaged_library_is_reinstalled(fake: FakeCuda, is_crash: bool) -> None:
    """The loader may reject a truncated file, or die from SIGBUS."""
    fake.onnxruntime_gpu(CUDART, CUBLAS, "libcurand.so.10", wrong_by=1)
    fake.wheel("nvidia-cuda-runtime", "13.0.9", CUDART)
    fake.wheel("nvidia-curand", "10.4.0", "libcurand.so.10")
    fake.wheel("nvidia-cublas", "13.1.0", CUBLAS)
    file = fake.packages / "nvidia/cu13/lib" / CUBLAS
    if is_crash:
        compile_library(file, CRASHES)
    else:
        file.write_bytes(b"\x7fELF\x02\x01 half of a file")
    fake.driver()
    (problem,) = blocking_problems()
    assert problem["what"].startswith(f"{CUBLAS} does not load: ")
    assert ("SIGSEGV" in problem["what"]) == is_crash
    assert problem["fix"] == "pip install --force-reinstall --no-deps nvidia-cublas==13.1.0"


@pytest.mark.parametrize(
    ("driver", "what", "fix"),
    [
        ({"version": 12040}, "up to 12.4, and the installed packages are built for CUDA 13", "580"),
        ({"version": 12040, "error": 803}, "up to 12.4", "nvidia-driver-580"),
        ({"error": 803}, "different versions", "sudo reboot"),
        ({"error": 802}, "fabric manager", "systemctl start nvidia-fabricmanager"),
        ({"error": 34}, "stub of the CUDA toolkit", "LD_LIBRARY_PATH"),
        ({"error": 999}, "driver error 999", "nvidia-smi"),
        ({"count": 0}, "offers no GPU", "nvidia-smi"),
        ({"major": 6}, "compute capability 6.6; CUDA 13 needs 7.5", "newer GPU"),
    ],
)
def test_unusable_drivers_and_gpus_are_reported(
    fake: FakeCuda, driver: dict[str, int], what: str, fix: str
) -> None:
    fake.onnxruntime_gpu(wrong_by=1)
    fake.driver(**driver)
    (problem,) = blocking_problems()
    assert what in problem["what"]
    assert fix in problem["fix"]


def test_a_missing_gpu_is_reported(fake: FakeCuda) -> None:
    fake.onnxruntime_gpu()
    fake.driver(count=2)
    (problem,) = blocking_problems("--device", "cuda:2")
    assert problem["what"] == "there is no cuda:2; the driver offers cuda:0 to cuda:1"
    assert problem["fix"] == "pass --device cuda:0"


def test_a_missing_driver_is_reported(fake: FakeCuda) -> None:
    fake.onnxruntime_gpu()
    if examine("cuda").facts.driver.is_found:
        pytest.skip("this machine has an NVIDIA driver")
    (problem,) = blocking_problems()
    assert "driver (libcuda.so.1) is not installed" in problem["what"]
    assert problem["fix"].startswith("sudo apt install nvidia-driver-580")


def test_a_device_that_computes_wrong_values_is_not_usable(fake: FakeCuda) -> None:
    fake.onnxruntime_gpu(wrong_by=1)
    fake.driver()
    (problem,) = blocking_problems()
    assert problem["what"] == "onnxruntime 1.31.1 computes wrong values on cuda:0"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("raise ImportError('libfoo.so: cannot open')", "libfoo.so: cannot open"),
        ("raise RuntimeError('numpy is too old')", "numpy is too old"),
        ("import sys; sys.exit('gone')", "exit code 1: gone"),
    ],
)
def test_an_onnxruntime_that_breaks_is_reported(fake: FakeCuda, code: str, what: str) -> None:
    fake.onnxruntime_gpu()
    fake.module("onnxruntime", code)
    fake.driver()
    (problem,) = blocking_problems()
    assert what in problem["what"]
    assert problem["fix"] == BOTH


def test_a_probe_that_hangs_is_stopped(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.onnxruntime_gpu()
    fake.module("onnxruntime", "import time; time.sleep(60)")
    monkeypatch.setattr(report, "TIMEOUT_S", 0.05)
    (problem, *_) = blocking_problems()
    assert "no answer in 0.05 seconds" in problem["what"]


def test_a_damaged_provider_is_reported(fake: FakeCuda) -> None:
    fake.onnxruntime_gpu(wrong_by=1)
    provider = fake.packages / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    fake.driver()
    for data in (b"", b"\x7fELF\x02\x01", b"text", provider.read_bytes()[:3000]):
        provider.write_bytes(data)
        (problem,) = blocking_problems()
        assert "libonnxruntime_providers_cuda.so does not load" in problem["what"]
        assert problem["fix"] == BOTH


def test_both_packages_hide_cuda(fake: FakeCuda) -> None:
    """pip leaves the CPU package's files in place of the GPU package's."""
    fake.distribution("onnxruntime-gpu", "1.31.1")
    fake.distribution("onnxruntime", "1.31.1")
    fake.module("onnxruntime", "def get_available_providers(): return ['CPUExecutionProvider']")
    fake.driver()
    (problem,) = blocking_problems()
    assert "both installed" in problem["what"]
    assert problem["fix"] == BOTH


def test_damaged_metadata_stops_nothing(fake: FakeCuda) -> None:
    (fake.packages / "onnxruntime_gpu-1.0.dist-info").mkdir()
    (fake.packages / "torch-1.0.dist-info").mkdir()
    (fake.packages / "torch-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\0")
    assert doctor("--device", "cpu").exit_code == 0


def facts(**changes: Any) -> Facts:
    """Return the facts of a machine with no problem but a failed trial."""
    values: dict[str, Any] = {
        "device": "cuda:0",
        "runtime": "onnx",
        "machine": Machine(python="3.13", executable="p", system="Linux", architecture="x86_64"),
        "packages": Packages(
            versions={"onnxruntime-gpu": "1.31.1", "torch": "2.13.0"},
            build="onnxruntime-gpu",
            cuda_version="13.0",
            provider="provider.so",
            torch_cuda="13.0",
        ),
        "driver": Driver(is_found=True, cuda_version=(13, 0), gpus=(GPU,)),
        "trial": Trial(framework="onnxruntime 1.31.1", problem="Error: it failed"),
    }
    return Facts(**values | changes)


MACHINE, PACKAGES = facts().machine, facts().packages
NO_DRIVER = Driver(is_found=False, problem="not found")


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({}, "does not compute on cuda:0: Error: it failed", BOTH),
        ({"packages": Packages()}, "ONNX Runtime is not installed", EXTRA),
        (
            {"packages": Packages(), "driver": None, "device": "cpu"},
            "ONNX Runtime is not installed",
            'pip install "gemma3-export[cpu]"',
        ),
        (
            {"packages": Packages(versions={"onnxruntime": "1"}, build="onnxruntime")},
            "the CPU build",
            f"pip uninstall -y onnxruntime && {EXTRA}",
        ),
        ({"packages": replace(PACKAGES, provider=None)}, "CUDA provider is missing", BOTH),
        (
            {"machine": replace(MACHINE, architecture="aarch64")},
            "requires Linux on x86-64",
            "pass --device cpu, or use a machine with Linux on x86-64",
        ),
        (
            {"driver": NO_DRIVER, "machine": replace(MACHINE, nvidia_devices=0)},
            "this machine has no NVIDIA GPU",
            "use a machine with an NVIDIA GPU, or pass --device cpu",
        ),
        (
            {
                "driver": NO_DRIVER,
                "machine": replace(MACHINE, is_container=True, nvidia_devices=1),
            },
            "not visible in this container",
            (
                "start it with `docker run --gpus all ...`; the host needs the NVIDIA driver and "
                "the package nvidia-container-toolkit"
            ),
        ),
        (
            {
                "driver": Driver(is_found=True, cuda_version=(13, 0), error_code=100),
                "machine": replace(MACHINE, variables={"CUDA_VISIBLE_DEVICES": "-1"}),
            },
            "CUDA_VISIBLE_DEVICES is '-1'",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            {
                "trial": Trial(
                    framework="onnxruntime", problem="x", log="CUDA failure 2: out of memory"
                )
            },
            "cuda:0 has no memory left",
            "nvidia-smi (shows which processes use it); stop them or choose another GPU",
        ),
        (
            {"runtime": "torchscript", "packages": replace(PACKAGES, torch_cuda=None)},
            "torch 2.13.0 is a build without CUDA",
            (
                'pip uninstall -y torch && pip install "gemma3-export[export]" (PyPI\'s torch for '
                "Linux has CUDA; use no other index)"
            ),
        ),
        (
            {"libraries": (Library(soname="libfoo.so.1", is_needed=True, problem="not found"),)},
            "libfoo.so.1 does not load",
            "install the system's package with libfoo.so.1",
        ),
    ],
)
def test_each_cause_has_its_fix(changes: dict[str, Any], what: str, fix: str) -> None:
    (problem,) = problems_of(facts(**changes))
    assert what in problem.what
    assert problem.fix == fix


def test_problems_that_do_not_block_are_notes() -> None:
    turing = replace(GPU, compute_capability=(7, 5))
    found = facts(
        driver=Driver(is_found=True, cuda_version=(13, 0), gpus=(turing,)),
        trial=Trial(framework="onnxruntime", is_right=True),
        libraries=(Library(soname="libcudnn.so.9", is_needed=False, problem="not found"),),
    )
    bfloat16, cudnn = problems_of(found)
    assert "bfloat16 needs 8.0" in bfloat16.what
    assert "nvidia-cudnn-cu13" in cudnn.what
    assert not bfloat16.blocks
    assert not cudnn.blocks


def test_the_cpu_can_be_examined() -> None:
    result = doctor("--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("cpu: usable\n")
    assert "driver" not in result.stdout


@pytest.mark.parametrize("device", ["auto", "tpu", "cuda:x"])
def test_unknown_devices_are_bad_usage(device: str) -> None:
    result = doctor("--device", device)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_torch_is_imported_only_for_its_own_runtimes(fake: FakeCuda) -> None:
    fake.module("torch", "raise SystemExit('torch was imported')")
    assert doctor("--device", "cpu").exit_code == 0
    result = doctor("--device", "cpu", "--runtime", "torchscript")
    assert result.exit_code == 3
    assert "torch was imported" in result.stdout


def test_torch_on_the_cpu_is_examined() -> None:
    found = examine("cpu", "torchscript")
    assert found.is_usable
    assert found.facts.trial.framework.startswith("torch ")


def test_needed_libraries_are_read_from_the_elf_file(fake: FakeCuda) -> None:
    fake.onnxruntime_gpu(CUBLAS, CUDART)
    provider = fake.packages / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    assert needed_libraries(provider)[:2] == (CUBLAS, CUDART)


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_errors_about_cuda_lead_to_the_doctor(ort_bundle: Path, command: str) -> None:
    prompt = ["--prompt", "a"] if command == "generate" else []
    arguments = [command, str(ort_bundle), *prompt, "--device", "cuda:63"]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 3
    assert "gemma3-export doctor" in result.stderr


@pytest.mark.placement
def test_over_the_stub_everything_is_found_and_the_values_are_wrong() -> None:
    """The stub does everything except compute, and the doctor notices."""
    python = cuda_python()
    with cuda_environment(python) as environment:
        done = subprocess.run(
            [str(python), "-m", "gemma3_export", "doctor", "--device", "cuda:1", "--json"],
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            cwd=os.sep,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert [gpu["name"] for gpu in found["driver"]["gpus"]] == ["stub of an NVIDIA H100"] * 2
    assert found["driver"]["gpus"][1]["compute_capability"] == [9, 0]
    names = [library["soname"] for library in found["libraries"]]
    assert any(name.startswith("libcublas.so.") for name in names)
    assert [library["problem"] for library in found["libraries"]] == [None] * len(names)
    assert found["trial"]["is_right"] is False
    (problem,) = [problem for problem in found["problems"] if problem["blocks"]]
    assert "computes wrong values on cuda:1" in problem["what"]
