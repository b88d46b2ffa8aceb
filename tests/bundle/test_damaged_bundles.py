"""Damaged or manually edited bundles: every command reports them in one message."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_writer import link_files
from gemma3_export.parity.intermediates import OnnxIntermediates
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.command_line import error_line, run
from tests.support.exported_bundles import edit_json


@pytest.fixture
def copied_bundle(ort_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(ort_bundle, tmp_path / "bundle"))


COMMANDS = (("inspect",), ("inspect", "--json"), ("generate", "--prompt", "a"), ("verify",))
MISSING = object()


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("versions",), None, "versions is null; it must be an object"),
        (("files", "config.json", "sha256"), 5, "files.config.json.sha256 is 5"),
        (("files", "config.json", "size_bytes"), "1", 'size_bytes is "1"; it must be a whole'),
        (("files", "../secret"), {"sha256": "", "size_bytes": 1}, "'../secret' leads out"),
        (("files", "..\\secret"), {"sha256": "", "size_bytes": 1}, "leads out of the bundle"),
        (("graphs",), {}, "graphs is {}; it must be a list"),
        (("graphs", 0), None, "graphs[0] is null; it must be an object"),
        (("graphs", 0, "path"), "/etc/passwd", "leads out of the bundle"),
        (("graphs", 0, "path"), "onnx/other.onnx", "'onnx/other.onnx' is not among its files"),
        (("graphs", 0, "windowed_path"), "../x", "leads out of the bundle"),
        (("graphs", 0, "runtime"), None, "graphs[0].runtime is null; it must be a string"),
        (("graphs", 0, "runtime"), MISSING, "graphs[0].runtime is missing"),
        (("graphs", 0, "cache_dtype"), "float128", 'graphs[0].cache_dtype is "float128"'),
        (("graphs", 0, "cache_dtype"), "int64", "is int64; it must be a floating-point type"),
        (("graphs", 0, "verified"), 1, "graphs[0].verified is 1; it must be true or false"),
        (("graphs", 0, "max_kld"), float("nan"), "manifest.json is damaged: JSON is malformed"),
        (("graphs", 0, "extra"), 1, "graphs[0].extra is unknown"),
    ],
)
def test_manifest_with_an_impossible_value(copied_bundle, place, value, complaint):
    path = copied_bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    parent = manifest
    for key in place[:-1]:
        parent = parent[key]
    if value is MISSING:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    path.write_text(json.dumps(manifest), encoding="utf-8")
    for command, *options in COMMANDS:
        assert complaint in error_line(command, copied_bundle, *options)


def test_two_graphs_of_one_variant(copied_bundle):
    path = copied_bundle / "manifest.json"
    graphs = json.loads(path.read_text(encoding="utf-8"))["graphs"]
    edit_json(path, graphs=graphs * 2)
    assert "2 graphs called 'onnx fp32'" in error_line("inspect", copied_bundle)


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file, and its record in the manifest."""
    (bundle / name).write_bytes(data)
    path = bundle / "manifest.json"
    files = json.loads(path.read_text(encoding="utf-8"))["files"]
    record = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    edit_json(path, files=files | {name: record})


@pytest.mark.parametrize(
    "proofs",
    [
        "{}",
        '{"onnx": {}}',
        '{"onnx": {"cases": null}}',
        '{"onnx": {"cases": [5]}}',
        '{"onnx": {"cases": [{"positions": 1, "metrics": "x"}]}}',
    ],
)
def test_invalid_parity_report(copied_bundle, proofs):
    replace_file(copied_bundle, "parity.json", proofs.encode())
    assert "parity.json" in error_line("inspect", copied_bundle)


def test_file_that_is_not_a_graph(copied_bundle, capfd):
    replace_file(copied_bundle, "onnx/model.onnx", b"{}" * 500)
    for command, *options in COMMANDS:
        assert "onnx/model.onnx" in error_line(command, copied_bundle, *options)
    assert "onnxruntime:" not in capfd.readouterr().err


def test_weights_that_end_early_give_one_message(copied_bundle, capfd):
    replace_file(copied_bundle, "onnx/model.onnx_data", b"\0" * 1000)
    error_line("generate", copied_bundle, "--prompt", "a")
    assert "onnxruntime:" not in capfd.readouterr().err  # its own log is written to the descriptor


@pytest.fixture
def linked_bundle(ort_bundle, tmp_path) -> Path:
    """A bundle of symbolic links to files elsewhere, as in the Hub's cache."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(p for p in ort_bundle.rglob("*") if p.is_file())):
        link = snapshot / file.relative_to(ort_bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        up = "../" * (len(link.relative_to(tmp_path).parts) - 1)
        link.symlink_to(f"{up}blobs/{number}")
    return snapshot


def test_bundle_of_links_is_verified_and_extended(linked_bundle, tmp_path):
    for command in (("verify",), ("generate", "--prompt", "a", "--max-new-tokens", "2")):
        result = run(command[0], linked_bundle, *command[1:])
        assert result.exit_code == 0, result.output
    copied = tmp_path / "copied"
    link_files(Bundle(linked_bundle), copied)  # the first step of adding a graph
    assert not any(path.is_symlink() for path in copied.rglob("*"))


def test_rewritten_graphs_find_weights_behind_links(linked_bundle):
    runtime = OnnxRuntime(linked_bundle, device="cpu", threads=1, sliding_window_cache=False)
    OnnxIntermediates(runtime)
    OnnxRuntime(linked_bundle, device="cpu", threads=1, float32_matmul=True)


def test_graph_that_names_a_file_outside_of_the_bundle(copied_bundle):
    data = copied_bundle / "onnx" / "model.onnx_data"
    graph = (copied_bundle / "onnx" / "model.onnx").read_bytes()
    assert len(b"model.onnx_data") == len(b"../../model.onn")
    shutil.copy(data, copied_bundle.parent / "model.onn")
    graph = graph.replace(b"model.onnx_data", b"../../model.onn")
    replace_file(copied_bundle, "onnx/model.onnx", graph)
    error_line("verify", copied_bundle)  # by ONNX Runtime already
    with pytest.raises(InputError, match=r"'\.\./\.\./model\.onn', which is not among the bundle"):
        open_bundle_weights(Bundle(copied_bundle))
