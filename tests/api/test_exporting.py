"""`gemma3_export.export_onnx` and `verify`: options, and weights by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import gemma3_export
from gemma3_export import InputError, OnnxOptions, Pt2Options, VerifyRequest
from gemma3_export.bundle import Bundle
from tests.support.exported_bundles import exported_bundle


def test_weights_and_tokenizer_may_be_paths(tiny_folder: Path, tmp_path: Path) -> None:
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


def test_other_formats_are_added_to_the_bundle(tiny_folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": None},
        {"verify": "no"},
        {"force": "no"},
        {"threads": 2.5},
        {"threads": True},
        {"tokenizer": 5},
        {"progress": "bar"},
        {"target": None},
        {"activations": 5},
        {"block_size": "32"},
        {"block_size": None},
        {"max_kld": "small"},
        {"calibration": 5},
        {"screen": "no"},
    ],
)
def test_an_option_of_the_wrong_type_is_named(
    tiny_folder: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        gemma3_export.export_onnx(tiny_folder, tmp_path / "out", **change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"device": None},
        {"runtime": 5},
        {"threads": True},
        {"cuda": {}},
        {"against": 5},
        {"seed": 1.5},
        {"max_kld": "small"},
        {"progress": 5},
    ],
)
def test_a_request_of_the_wrong_type_is_named(ort_bundle: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        gemma3_export.verify(ort_bundle, **change)


@pytest.mark.parametrize("weights", [None, 5, b"weights", ["weights"]])
def test_invalid_weights_are_rejected(ort_bundle: Path, tmp_path: Path, weights: object) -> None:
    with pytest.raises(TypeError, match="weights must be"):
        gemma3_export.export_onnx(weights, tmp_path / "out")
    if weights is not None:
        with pytest.raises(TypeError, match="weights must be"):
            gemma3_export.verify(ort_bundle, weights=weights, threads=1)


@pytest.mark.parametrize("options", [{}, 5, Pt2Options(), VerifyRequest()])
def test_options_of_another_kind_are_rejected(
    tiny_folder: Path, tmp_path: Path, options: object
) -> None:
    with pytest.raises(TypeError, match="must be of type OnnxOptions"):
        gemma3_export.export_onnx(tiny_folder, tmp_path / "out", options)


def test_configs_and_calibration_texts_may_be_strings(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_folder / "config.json"
    source = gemma3_export.open_weights(config_path=str(config), random_seed=3)
    assert source.config == gemma3_export.open_weights(tiny_folder, config_path=config).config
    text = tmp_path / "short.txt"
    text.write_text("Too short.", encoding="utf-8")
    with pytest.raises(InputError, match="calibration needs"):
        gemma3_export.export_onnx(
            tiny_folder, tmp_path / "out", dtype="int4", block_size=16, calibration=str(text)
        )
    for change in ({"size": 5}, {"random_seed": 1.5}, {"token": 5}):
        with pytest.raises(TypeError, match=next(iter(change))):
            gemma3_export.open_weights(**change)


def test_a_progress_callback_that_raises_leaves_no_output(
    tiny_folder: Path, tmp_path: Path
) -> None:
    def fail(stage: str, done: int, total: int) -> None:
        raise ArithmeticError(stage)

    with pytest.raises(ArithmeticError):
        gemma3_export.export_onnx(tiny_folder, tmp_path / "out", progress=fail, threads=1)
    assert not list(tmp_path.iterdir())
