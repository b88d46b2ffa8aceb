"""The benchmark's report and its errors, on tiny bundles; no test depends on timing."""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gemma3_export.bench import run as benchmark
from gemma3_export.bench.process import Worker, own_worker
from gemma3_export.bench.run import BenchmarkOptions, run_benchmark
from gemma3_export.cli import command_line
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from tests.support.exported_bundles import VARIANTS, exported_bundle, source_of

CONFIG = VARIANTS["irregular"]
SMALL = ["--prompt-tokens", "20", "--new-tokens", "4", "--repeat", "2", "--threads", "1"]
FACTS = {"import_s", "load_s", "load_peak_memory_bytes", "describe"}
MEASURED = {
    "time_to_first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "busy_processors",
    "share_of_bandwidth",
    "peak_memory_bytes",
}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command_line, ["bench", *arguments])


def assert_spread(values: dict[str, float]) -> None:
    assert 0 < values["min"] <= values["median"] <= values["max"]


def assert_facts(facts: dict[str, Any]) -> None:
    assert facts.keys() == FACTS
    assert facts["load_s"] > 0
    assert facts["load_peak_memory_bytes"] > 2**20
    assert facts["describe"]["threads"] == 1
    assert facts["describe"]["bytes_per_token"] >= 4 * CONFIG.num_parameters


def assert_measured(candidate: dict[str, Any]) -> None:
    assert candidate.keys() == MEASURED
    assert candidate["peak_memory_bytes"] > 2**20
    assert candidate["share_of_bandwidth"] > 0
    for key in ("time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert_spread(candidate[key])


def own(bundle: Path) -> AbstractContextManager[Worker]:
    asked = {"name": "onnx", "bundle": str(bundle), "device": "cpu", "threads": 1}
    return own_worker("onnx", asked)


def test_against_transformers_gives_both_sides_and_their_ratios() -> None:
    pytest.importorskip("transformers")
    done = run(
        str(exported_bundle("ort")), *SMALL, "--batch", "2", "--against", "transformers", "--json"
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report.keys() == {"machine", "options", "candidates", "cases"}
    assert report["options"]["batch"] == [2]
    assert report["machine"]["processors"] >= 1
    assert report["machine"]["read_bytes_per_s"]["min"] > 1e8
    assert list(report["candidates"]) == ["onnx", "transformers"]
    for facts in report["candidates"].values():
        assert_facts(facts)
    (case,) = report["cases"]
    assert (case["prompt_tokens"], case["batch"], case["new_tokens"]) == (20, 2, 4)
    assert list(case["candidates"]) == ["onnx", "transformers"]
    for candidate in case["candidates"].values():
        assert_measured(candidate)
    for key in ("prefill", "decode"):
        assert_spread(case["ratios"]["transformers"][key])
    assert case["same_tokens"] == {"transformers": 1.0}, "both sides ran the same model"


def test_one_runtime_alone_has_no_ratios_and_reads_well() -> None:
    done = run(str(exported_bundle("portable")), *SMALL)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "1 threads; median (min to max) of 2" in lines
    assert "prompt 20, batch 1, 4 new tokens" in lines
    for what in ("load s", "first token s", "prefill tokens/s", "decode tokens/s", "of limit"):
        assert sum(what in line for line in lines) == 1, what
    assert "against" not in done.stdout


def test_the_reference_can_be_the_peer() -> None:
    options = BenchmarkOptions(
        prompt_tokens=(7,), new_tokens=2, threads=1, repeat=1, against=("reference",)
    )
    report = run_benchmark(exported_bundle("ort"), options)
    assert list(report["candidates"]) == ["onnx", "reference"]
    assert report["cases"][0]["same_tokens"] == {"reference": 1.0}


def test_an_int8_archive_is_measured(tmp_path: Path) -> None:
    bundle = export_bundle(
        source_of(), tmp_path / "int8", TorchScriptWriter(dtype="int8", block_size=16)
    )
    options = BenchmarkOptions(
        prompt_tokens=(7,), new_tokens=2, threads=1, repeat=1, runtime="torchscript"
    )
    report = run_benchmark(bundle.path, options)
    size = report["candidates"]["torchscript"]["describe"]["bytes_per_token"]
    assert size == (bundle.path / "torchscript" / "model_quantized.ts").stat().st_size
    assert report["cases"][0]["candidates"]["torchscript"]["share_of_bandwidth"] > 0


def test_onnx_alone_does_not_load_torch() -> None:
    with own(exported_bundle("ort")) as worker:
        maps = Path(f"/proc/{worker.process.pid}/maps")
        if not maps.exists():
            pytest.skip("reads Linux's /proc")
        assert "libtorch" not in maps.read_text()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_a_waiting_candidate_is_stopped_and_ends_with_the_benchmark() -> None:
    with own(exported_bundle("ort")) as worker:
        pid = worker.process.pid
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        assert worker.measure([[1, 2, 3]], 1)["tokens"]
    assert not Path(f"/proc/{pid}").exists()


def test_a_candidate_that_dies_is_reported() -> None:
    with own(exported_bundle("ort")) as worker:
        worker.process.kill()
        with pytest.raises(Gemma3ExportError, match="onnx process ended"):
            worker.measure([[1, 2, 3]], 1)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_peer_is_reported_with_the_install_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *arguments: Any) -> Any:
        return None if name == package else find_spec(name, *arguments)

    monkeypatch.setattr(benchmark.importlib.util, "find_spec", without)
    done = run(str(exported_bundle("ort")), *SMALL, "--against", "transformers")
    assert done.exit_code == UnavailableError.exit_code
    assert f"needs {package}; run: pip install" in done.stderr


def test_a_missing_gpu_is_reported_by_the_worker() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is available")
    done = run(str(exported_bundle("ort")), *SMALL, "--device", "cuda")
    assert done.exit_code == UnavailableError.exit_code
    assert "--device cpu" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "250", "--new-tokens", "7"], "context of 256"),
        (["--repeat", "0"], "repeat"),
        (["--against", "llama"], "unknown peer"),
        (["--against", "reference", "--against", "reference"], "measured against itself"),
        (["--device", "gpu"], "unknown device"),
        (["--runtime", "reference", "--against", "reference"], "measured against itself"),
    ],
)
def test_bad_options_are_rejected(arguments: list[str], message: str) -> None:
    done = run(str(exported_bundle("ort")), *SMALL, *arguments)
    assert done.exit_code == InputError.exit_code, done.output
    assert message in done.stderr


def test_a_folder_that_is_not_a_bundle_is_rejected(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.exit_code == InputError.exit_code
    assert "not a gemma3-export bundle" in done.stderr
