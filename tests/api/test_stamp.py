"""``verify(..., stamp=True)``: an unverified export gets its proof, or stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from gemma3_export.api.verification import verify
from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.exporters import bundle_writer
from tests.support.command_line import error_line, run, run_ok
from tests.support.exported_bundles import accept_changes, edit_json
from tests.support.tiny_models import write_hf_folder


@pytest.fixture
def unproven(portable_bundle: Path, tmp_path: Path) -> Path:
    """Return an export of ``tiny_folder`` that was not verified."""
    return Path(shutil.copytree(portable_bundle, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_stamped_bundle_has_the_proof_that_an_export_writes(
    unproven: Path, tiny_folder: Path, ort_bundle: Path
) -> None:
    before = contents(unproven)
    assert not Bundle(unproven).graph("onnx").verified
    result = run_ok("verify", unproven, "--weights", tiny_folder, "--stamp")
    assert result.stdout.rstrip().splitlines()[-1].startswith("PASS")
    assert f"stamped: {unproven / 'parity.json'}" in result.stderr
    after = contents(unproven)
    assert Bundle(unproven).graph("onnx").verified
    stamped, exported = (
        next(iter(json.loads((folder / "parity.json").read_bytes()).values()))
        for folder in (unproven, ort_bundle)
    )
    assert stamped["passed"]
    assert stamped["source"] == exported["source"]
    assert "decode" in [case["name"] for case in stamped["cases"]]
    changed = {name for name in after if after[name] != before.get(name)}
    assert {"parity.json", "manifest.json"} <= changed
    assert not any(name.startswith("onnx/") for name in changed)
    assert "proof: passed" in run_ok("inspect", unproven, "--check").stdout
    assert list(unproven.parent.iterdir()) == [unproven]


def test_a_bundle_that_fails_is_not_stamped(unproven: Path, tiny_folder: Path) -> None:
    graph = unproven / "onnx/model.onnx"
    model = onnx.load(graph, load_external_data=False)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.attribute[0].s = b"none"
    graph.write_bytes(model.SerializeToString())
    accept_changes(unproven)
    before = contents(unproven)
    result = run("verify", unproven, "--weights", tiny_folder, "--stamp")
    assert result.exit_code == 1
    assert contents(unproven) == before


@pytest.mark.parametrize("step", ["link_files", "add_proof", "finish_bundle"])
def test_an_interrupted_stamp_leaves_the_bundle_as_it_was(
    step: str, unproven: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = contents(unproven)
    monkeypatch.setattr(bundle_writer, step, interrupt)
    bundle = Bundle(unproven)
    with pytest.raises(KeyboardInterrupt):
        bundle_writer.stamp_bundle(bundle, bundle.graph("onnx"), "{}")
    assert contents(unproven) == before
    assert list(unproven.parent.iterdir()) == [unproven]


def test_a_bundle_that_changed_meanwhile_is_not_stamped(unproven: Path) -> None:
    bundle = Bundle(unproven)
    edit_json(unproven / "manifest.json", versions={"gemma3-export": "0"})
    before = contents(unproven)
    with pytest.raises(InputError, match="changed while it was checked"):
        bundle_writer.stamp_bundle(bundle, bundle.graph("onnx"), "{}")
    assert contents(unproven) == before


def test_only_the_weights_that_the_manifest_names_can_prove_a_bundle(
    unproven: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert "pass them with --weights" in error_line("verify", unproven, "--stamp")
    write_hf_folder(tmp_path / "other", Bundle(unproven).config, seed=9)
    line = error_line("verify", unproven, "--weights", tmp_path / "other", "--stamp")
    assert "has other files than the weights" in line
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    with pytest.raises(InputError, match="leave out --against"):
        verify(unproven, weights=moved, against="transformers", stamp=True)
    with pytest.raises(InputError, match="leave out --device cuda"):
        verify(unproven, weights=moved, device="cuda", stamp=True)
    (unproven / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"notes\.txt"):
        verify(unproven, weights=moved, stamp=True)
