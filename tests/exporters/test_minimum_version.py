"""The oldest ONNX Runtime that runs a graph: what the manifest says, and what old releases do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.exported_bundles import exported, exported_bundle

OLD_OPSET = OnnxWriter(target="portable", opset=21)
PROMPT = [2, 9, 4, 7, 7, 90, 3, 25, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]  # past the window
# Runs in the environments of old releases, which have only onnxruntime and numpy.
STEP = """
import sys
import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.log_severity_level = 4
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
past = [i for i in session.get_inputs() if i.name.startswith("past")]
empty = np.zeros((1, past[0].shape[1], 0, past[0].shape[3]), np.float32)
ids = np.array([[int(i) for i in sys.argv[2].split(",")]])
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | {i.name: empty for i in past}
np.save(sys.argv[3], session.run(["logits"], feeds)[0])
"""


def step(python: str, graph: Path, output: Path) -> subprocess.CompletedProcess[str]:
    arguments = [str(graph), ",".join(map(str, PROMPT)), str(output)]
    return subprocess.run(
        [python, "-c", STEP, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("writer", "needed"),
    [
        (OnnxWriter(), "1.24"),
        (OnnxWriter(target="portable"), "1.23"),
        (OLD_OPSET, "1.18"),
        (OnnxWriter(dtype="bf16"), "1.31"),
    ],
    ids=["ort", "portable", "portable, opset 21", "bf16"],
)
def test_the_manifest_names_the_oldest_version(writer: OnnxWriter, needed: str) -> None:
    bundle = Bundle(exported(writer))
    assert bundle.graph("onnx").min_onnxruntime == needed


def test_an_older_version_is_rejected_with_the_needed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.23.2")
    with pytest.raises(InputError, match=r"model\.onnx needs onnxruntime 1\.24 or newer.*1\.23\.2"):
        OnnxRuntime(exported_bundle("ort"))


def test_opset_21_has_only_its_own_operators_and_computes_the_same(tmp_path: Path) -> None:
    path = exported(OLD_OPSET) / "onnx" / "model.onnx"
    model = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    onnx.checker.check_model(model, full_check=True)
    new = exported_bundle("portable") / "onnx" / "model.onnx"
    logits = []
    for index, graph in enumerate((path, new)):
        done = step(sys.executable, graph, tmp_path / f"{index}.npy")
        assert done.returncode == 0, done.stderr
        logits.append(np.load(tmp_path / f"{index}.npy"))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("opset", [21, 23])
def test_fused_attention_takes_no_other_opset(opset: int) -> None:
    with pytest.raises(InputError, match=f"opset {opset} is not supported for target ort"):
        OnnxWriter(opset=opset)


@pytest.mark.network
@pytest.mark.parametrize("version", ["1.18.1", "1.20.1", "1.22.1", "1.23.2", "1.24.1"])
def test_old_versions_compute_the_same_or_fail(version: str, tmp_path: Path) -> None:
    """Windows are one token too long before 1.24, so graphs with fused attention must not open."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", f"onnxruntime=={version}", "numpy"]
    subprocess.run(install, check=True, capture_output=True)
    release = tuple(map(int, version.split(".")[:2]))
    for writer, since in (
        (OLD_OPSET, (1, 18)),
        (OnnxWriter(target="portable"), (1, 23)),
        (OnnxWriter(), (1, 24)),
    ):
        graph = exported(writer) / "onnx" / "model.onnx"
        done = step(python, graph, tmp_path / "old.npy")
        assert (done.returncode == 0) == (release >= since), (writer, done.stderr)
        if release >= since:
            assert step(sys.executable, graph, tmp_path / "new.npy").returncode == 0
            old, new = (np.load(tmp_path / f"{name}.npy") for name in ("old", "new"))
            np.testing.assert_allclose(old, new, atol=1e-4)
        else:
            assert "Opset" in done.stderr
