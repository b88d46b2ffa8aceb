"""The placement of exported graphs by ONNX Runtime's CUDA provider, without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gemma3_export.bundle import Bundle
from gemma3_export.cli.command_line import command_line
from gemma3_export.cuda.placement import check_placement, judge
from gemma3_export.cuda.stub import compile_stub, find_provider
from gemma3_export.errors import UnavailableError
from tests.support.cuda_formats import ONNX_FORMATS, CudaFormat
from tests.support.cuda_python import cuda_python
from tests.support.exported_bundles import exported_bundle
from tests.support.tiny_models import TINY

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
ON_GPU = ("Gather", "RMSNormalization", "MatMul", "GroupQueryAttention", "Gemm")


def found(**changes: Any) -> dict[str, Any]:
    """Return what the worker prints for a correctly placed graph."""
    nodes = [{"provider": CUDA, "operator": op, "name": op} for op in ON_GPU]
    nodes += [{"provider": CPU, "operator": "Squeeze", "name": "shape"}]
    facts = {
        "onnxruntime": "1.0",
        "providers": [CUDA, CPU],
        "nodes": nodes,
        "copies": [],
        "capture_problem": None,
    }
    return facts | changes


def test_only_shape_computations_may_run_on_the_cpu() -> None:
    assert judge("model.onnx", found()).passed
    moved = [
        {**node, "provider": CPU} if node["operator"] == "MatMul" else node
        for node in found()["nodes"]
    ]
    report = judge("model.onnx", found(nodes=moved))
    assert report.problems == (f"1 MatMul nodes are on {CPU}",)


@pytest.mark.parametrize("missing", ["Gather", "RMSNormalization", "GroupQueryAttention"])
def test_operators_that_read_weights_or_caches_must_run_on_the_gpu(missing: str) -> None:
    nodes = [node for node in found()["nodes"] if node["operator"] != missing]
    (problem,) = judge("model.onnx", found(nodes=nodes)).problems
    assert problem.startswith("no ")
    assert problem.endswith(" is on the GPU")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"copies": ["logits"]}, "1 values are copied"),
        (
            {"capture_problem": "control flow"},
            "the graph cannot be captured as a CUDA graph: control flow",
        ),
        ({"providers": [CPU]}, f"the session does not use {CUDA}"),
    ],
)
def test_copies_and_fallbacks_are_problems(changes: dict[str, Any], problem: str) -> None:
    (only,) = judge("model.onnx", found(**changes)).problems
    assert only.startswith(problem)


def test_a_missing_wheel_or_compiler_is_named_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match=r"not Python 3\.11"):
        find_provider(tmp_path / "python")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="apt install gcc"):
        compile_stub(tmp_path / "library.so", tmp_path)


def test_inspect_says_how_to_install_what_it_needs(
    ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma3_export.cuda.stub.PROVIDER", "not there")
    result = CliRunner().invoke(command_line, ["inspect", str(ort_bundle), "--cuda-placement"])
    assert result.exit_code == 3
    assert f"{sys.executable} does not have onnxruntime-gpu" in result.stderr
    assert "pip install onnxruntime-gpu" in result.stderr


@pytest.mark.placement
@pytest.mark.parametrize("form", ONNX_FORMATS, ids=lambda form: form.name)
def test_every_format_runs_on_the_gpu_from_end_to_end(form: CudaFormat) -> None:
    report = check_placement(Bundle(form.bundle()), cuda_python())
    assert report.passed, report.problems
    attention = "GroupQueryAttention" if form.is_fused else "Attention"
    assert report.operators[CUDA][attention] == TINY.num_hidden_layers
    assert report.memory_copies == ()
    assert report.is_capturable


@pytest.mark.placement
def test_a_graph_that_falls_back_fails() -> None:
    """GroupQueryAttention has no float32 kernel on CUDA."""
    arguments = ["inspect", str(exported_bundle("ort")), "--cuda-placement", "--json"]
    result = CliRunner().invoke(command_line, [*arguments, "--cuda-python", str(cuda_python())])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False
    assert report["operators"][CPU]["GroupQueryAttention"] == 5
    assert len(report["memory_copies"]) >= 15
    assert "5 GroupQueryAttention nodes are on CPUExecutionProvider" in report["problems"]
