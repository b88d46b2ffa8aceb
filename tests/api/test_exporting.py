"""`gemma3_export.export_onnx` and `verify`: options, and weights by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import gemma3_export
from gemma3_export import InputError, OnnxOptions, VerifyRequest
from gemma3_export.bundle import Bundle
from tests.support.exported_bundles import exported_bundle


def test_weights_may_be_a_path_and_the_tokenizer_too(tiny_folder: Path, tmp_path: Path) -> None:
    done = gemma3_export.export_onnx(
        tiny_folder, tmp_path / "out", verify=False, tokenizer=tiny_folder, threads=1
    )
    assert done.path == tmp_path / "out"
    assert not done.verified
    assert gemma3_export.load(done.path, device="cpu").generate("A", max_new_tokens=2).text


def test_keywords_change_the_options(tiny_folder: Path, tmp_path: Path) -> None:
    options = OnnxOptions(target="portable", verify=False, threads=1)
    done = gemma3_export.export_onnx(str(tiny_folder), str(tmp_path / "out"), options)
    assert Bundle(done.path).graph("onnx").target == "portable"
    with pytest.raises(InputError, match="exists"):
        gemma3_export.export_onnx(str(tiny_folder), str(tmp_path / "out"), options)
    done = gemma3_export.export_onnx(
        str(tiny_folder), str(tmp_path / "out"), options, force=True, target="ort"
    )
    assert Bundle(done.path).graph("onnx").target == "ort"


def test_a_mistyped_option_is_named_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'dtyp'.*did you mean 'dtype'"):
        gemma3_export.export_onnx("no such weights", tmp_path / "out", dtyp="int8")


def test_other_formats_join_the_bundle(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gemma3_export.export_torchscript(tiny_folder, out, verify=False, threads=1)
    gemma3_export.export_pt2(tiny_folder, out, verify=False, threads=1)
    assert {graph.runtime for graph in Bundle(out).manifest.graphs} == {"torchscript", "pt2"}


def test_verify_takes_a_folder_and_says_whether_it_passed(tiny_folder: Path) -> None:
    bundle = exported_bundle("ort")
    assert gemma3_export.verify(bundle, threads=1).passed
    request = VerifyRequest(threads=1, against="reference")
    assert gemma3_export.verify(str(bundle), request).baseline["runtime"] == "reference"


def test_verify_takes_the_weights_by_name(ort_bundle: Path, tiny_folder: Path) -> None:
    assert gemma3_export.verify(ort_bundle, weights=tiny_folder, threads=1).passed
