"""``verify`` and ``inspect``: what they print, and the bundles they reject."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.config import load_config
from tests.support.command_line import error_line, run, run_ok
from tests.support.exported_bundles import edit_json
from tests.support.tiny_models import write_hf_folder

BUNDLE_FILES = (
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model_windowed.onnx",
    "parity.json",
    "parity.svg",
    "tokenizer.json",
    "tokenizer_config.json",
)


def test_verify_writes_all_its_reports(ort_bundle, tmp_path):
    names = ("report.json", "junit.xml", "page.html")
    result = run_ok(
        *("verify", ort_bundle, "--seed", 3, "--report", tmp_path / names[0]),
        *("--junit", tmp_path / names[1], "--html", tmp_path / names[2]),
    )
    assert result.stdout.rstrip().splitlines()[-1].startswith("PASS")
    report = json.loads((tmp_path / names[0]).read_text(encoding="utf-8"))
    assert report["passed"] is True
    assert report["options"]["seed"] == 3
    ElementTree.parse(tmp_path / names[1])
    assert "<html" in (tmp_path / names[2]).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_verify_against_another_bundle(ort_bundle, portable_bundle):
    result = run_ok("verify", portable_bundle, "--against", ort_bundle, "--json")
    assert json.loads(result.stdout)["baseline"]["target"] == "ort"


@pytest.mark.parametrize("is_folder", [False, True], ids=["its weights", "a folder"])
def test_verify_against_transformers(ort_bundle, tiny_folder, is_folder):
    pytest.importorskip("transformers")
    other = tiny_folder if is_folder else "transformers"
    result = run_ok("verify", ort_bundle, "--against", other, "--json")
    assert json.loads(result.stdout)["baseline"]["runtime"] == "transformers"


def test_verify_against_an_unknown_baseline_is_rejected(ort_bundle, tmp_path):
    result = run("verify", ort_bundle, "--against", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "not a bundle, a Hugging Face folder or a runtime" in result.stderr


@pytest.mark.parametrize("change", [{"vocab_size": 399}, {"head_dim": 18}])
def test_verify_against_a_folder_of_another_shape_is_rejected(ort_bundle, tmp_path, change):
    pytest.importorskip("transformers")
    write_hf_folder(tmp_path, replace(Bundle(ort_bundle).config, **change))
    result = run("verify", ort_bundle, "--against", tmp_path)  # transformers prints its progress
    assert result.exit_code == 2
    (value,) = change.values()
    assert re.search(rf"error: .*\b{value}\b.*exports of one model", result.stderr)


@pytest.mark.parametrize("vocab_size", [399, 401])
def test_verify_against_a_bundle_of_another_shape_is_rejected(ort_bundle, tmp_path, vocab_size):
    other, bundle = replace(Bundle(ort_bundle).config, vocab_size=vocab_size), tmp_path / "bundle"
    write_hf_folder(tmp_path / "other", other)
    weights = ("--weights", tmp_path / "other", "--no-verify", "--threads", 1)
    run_ok("torchscript", *weights, "-o", bundle)
    line = error_line("verify", ort_bundle, "--against", bundle)
    assert f"has {vocab_size} tokens, but the bundle to check has 400" in line


def test_verify_fails_with_other_weights(ort_bundle, tmp_path):
    write_hf_folder(tmp_path / "other", Bundle(ort_bundle).config, seed=9)
    result = run("verify", ort_bundle, "--weights", tmp_path / "other", "--report", tmp_path / "r")
    assert result.exit_code == 1
    assert json.loads((tmp_path / "r").read_text(encoding="utf-8"))["passed"] is False


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_inspect_prints_the_facts_of_a_bundle(ort_bundle, check):
    facts = json.loads(run_ok("inspect", ort_bundle, "--json", *check).stdout)
    (graph,) = facts["graphs"]
    assert facts["model"]["parameters"] == Bundle(ort_bundle).config.num_parameters
    assert graph["cache_bytes_per_token"] == 5 * 2 * 2 * 16 * 4  # layers, k and v, heads, size
    assert graph["operators"]["com.microsoft::GroupQueryAttention"] == 5
    text = run_ok("inspect", ort_bundle, *check).stdout
    assert "proof: passed" in text
    origin = r"^weights: tiny \(safetensors\)\n  model.safetensors: SHA-256 \w{64}$"
    assert re.search(origin, text, re.MULTILINE)
    assert "{" not in text
    assert ("SHA-256 checked" in text) == bool(check)


@pytest.fixture
def copied_bundle(ort_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(ort_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_changed_file_is_named(copied_bundle, name):
    path = copied_bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert name in error_line("verify", copied_bundle)
    assert name in error_line("inspect", copied_bundle, "--check")


def test_every_file_of_a_bundle_is_covered(ort_bundle):
    found = {path.relative_to(ort_bundle).as_posix() for path in ort_bundle.rglob("*.*")}
    # What readers may edit is in tests/bundle/test_model_card.py.
    assert found == {*BUNDLE_FILES, "manifest.json", "README.md", ".gitattributes"}


def test_a_missing_file_is_named(copied_bundle):
    (copied_bundle / "onnx/model.onnx_data").unlink()
    for command in (("inspect",), ("generate", "--prompt", "a"), ("verify",)):
        assert "onnx/model.onnx_data" in error_line(command[0], copied_bundle, *command[1:])


def test_a_changed_manifest_is_rejected(copied_bundle):
    files = json.loads((copied_bundle / "manifest.json").read_text(encoding="utf-8"))["files"]
    files["tokenizer.json"]["sha256"] = "0" * 64
    edit_json(copied_bundle / "manifest.json", files=files)
    assert "tokenizer.json" in error_line("verify", copied_bundle)
    (copied_bundle / "manifest.json").write_text("{", encoding="utf-8")
    assert "manifest.json" in error_line("inspect", copied_bundle)


def test_a_newer_format_version_asks_for_an_upgrade(copied_bundle):
    edit_json(copied_bundle / "manifest.json", format_version=99)
    for command in (("inspect",), ("generate", "--prompt", "a"), ("verify",)):
        message = error_line(command[0], copied_bundle, *command[1:])
        assert "99" in message
        assert "upgrade" in message


def test_a_missing_folder_is_not_a_bundle(tmp_path):
    assert "nothing does not exist" in error_line("inspect", tmp_path / "nothing")
    assert "not a gemma3-export bundle" in error_line("inspect", tmp_path)


@pytest.fixture
def other_export(portable_bundle, tmp_path) -> Path:
    """Return a folder with a graph of another tool, made from the weights of ``tiny_folder``."""
    folder = tmp_path / "other"
    shutil.copytree(portable_bundle / "onnx", folder)
    return folder


def test_verify_holds_a_graph_of_another_tool_against_weights(other_export, tiny_folder, tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--weights", tiny_folder, "--report", report)
    result = run_ok("verify", other_export, *arguments)
    assert result.stdout.rstrip().splitlines()[-1].startswith("PASS")
    found = json.loads(report.read_text(encoding="utf-8"))
    assert sorted(found["files"]) == ["model.onnx", "model.onnx_data"]
    assert sum(case["is_text"] for case in found["cases"]) == 5
    write_hf_folder(tmp_path / "weights", load_config(tiny_folder), seed=9)
    graph = other_export / "model.onnx"
    result = run("verify", graph, "--weights", tmp_path / "weights", "--tokenizer", tiny_folder)
    assert result.exit_code == 1
    assert "first divergence: layer 0" in result.stdout


def test_verify_needs_the_weights_of_a_graph_of_another_tool(other_export, tiny_folder):
    graph = other_export / "model.onnx"
    assert "pass the weights that it was made from with --weights" in error_line("verify", graph)
    line = error_line("verify", graph, "--weights", tiny_folder, "--runtime", "pt2")
    assert "which the pt2 runtime cannot run" in line
    assert "does not exist" in error_line("verify", "none.onnx", "--weights", tiny_folder)


def test_verify_asks_which_of_several_graphs(other_export, tiny_folder):
    (other_export / "model.onnx").rename(other_export / "decode.onnx")
    shutil.copy(other_export / "decode.onnx", other_export / "prefill.onnx")
    line = error_line("verify", other_export, "--weights", tiny_folder)
    assert "has several graphs (decode.onnx, prefill.onnx)" in line


def test_verify_takes_a_bundle_without_its_manifest(copied_bundle, tiny_folder):
    (copied_bundle / "manifest.json").unlink()
    assert run_ok("verify", copied_bundle, "--weights", tiny_folder).stdout.count("\nPASS") == 1
