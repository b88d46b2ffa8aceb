"""The short benchmark for GPUs: its table on the CPU, and what it makes of a profile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from torch._C._autograd import DeviceType

from benchmarks import gpu_steps
from tests.exporters.test_torchscript import exported
from tests.support.exported_bundles import exported_bundle


@pytest.mark.parametrize("runtime", ["onnx", "torchscript"])
def test_one_table_with_a_line_per_batch(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "bandwidths_of", lambda device, threads: ([2e9], None))
    monkeypatch.setattr(gpu_steps, "TIMED", 5)
    bundle = exported_bundle("ort") if runtime == "onnx" else exported()
    options = ["--device", "cpu", "--batch", "1", "--batch", "3", "--prompt-tokens", "7"]
    result = CliRunner().invoke(
        gpu_steps.main, [str(bundle), "--runtime", runtime, *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    first, _, title, header, *lines = result.stdout.splitlines()
    assert first == "cpu reads memory at 2 GB/s; prompts of 7 tokens"
    assert title == f"{bundle}, {runtime}"
    assert header.split()[0] == "batch"
    assert [line.split()[:2] for line in lines] == [["1", "no"], ["3", "no"]]
    assert all("%" in line for line in lines)


def test_kernels_and_time_per_step_are_those_of_the_gpu() -> None:
    def event(name: str, device_type: DeviceType, us: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device_type, device_time=us)

    events = [
        event("gemm", DeviceType.CUDA, 30.0),
        event("norm", DeviceType.CUDA, 10.0),
        event("Memcpy DtoH", DeviceType.CUDA, 4.0),
        event("cudaGraphLaunch", DeviceType.CPU, 900.0),
    ]
    assert gpu_steps.on_the_gpu(events * 5, 5) == (pytest.approx(0.044), 2.0)


def test_the_share_is_that_of_the_gpu_s_time() -> None:
    times = gpu_steps.StepTimes(prefill_ms=3.5, step_ms=2.0, gpu_ms=1.0, kernels=529)
    assert gpu_steps.row_of(times, 8, "yes", limit_ms=0.25) == (
        "8",
        "yes",
        "4,000",
        "2.000",
        "1.000",
        "529",
        "25%",
        "3.5",
    )
