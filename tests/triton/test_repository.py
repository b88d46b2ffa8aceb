"""A bundle becomes a model of a Triton repository, all of it or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.triton.repository import open_recorded_bundle
from tests.support import triton_server
from tests.support.chat_templates import chat_bundle
from tests.support.command_line import error_line, run_ok


@pytest.fixture(scope="module")
def bundle() -> Path:
    return chat_bundle("functiongemma")


def test_a_copy_is_complete_and_its_config_is_triton_s(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    printed = run_ok(
        "triton", bundle, "-o", repository, "--slots", 3, "--cache-memory", "2GB"
    ).output
    folder = repository / bundle.name
    assert "tritonserver --model-repository" in printed
    config = triton_server.read_config(folder / "config.pbtxt")
    assert config["backend"] == "python"
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert config["parameters"]["slots"]["string_value"] == "3"
    assert config["parameters"]["cache_bytes"]["string_value"] == "2000000000"
    assert "threads" not in config["parameters"]
    assert {each["name"] for each in config["output"]} >= {"text_output", "token_ids"}
    assert all(each["optional"] for each in config["input"])
    copy = open_recorded_bundle(folder / "1")
    assert copy.path == folder / "1/bundle"
    copy.check_files()
    assert [path.name for path in repository.iterdir()] == [bundle.name], "nothing is left beside"


def test_gpus_are_chosen_in_the_config(bundle: Path, tmp_path: Path) -> None:
    for device, expected in (
        ("cuda", {"count": 1, "kind": "KIND_GPU"}),
        ("cuda:2", {"count": 1, "kind": "KIND_GPU", "gpus": [2]}),
    ):
        run_ok("triton", bundle, "-o", tmp_path, "--name", "m", "--device", device, "--force")
        config = triton_server.read_config(tmp_path / "m/config.pbtxt")
        assert config["instance_group"] == [expected]


def test_a_bundle_elsewhere_is_not_copied_but_recognized(bundle: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    run_ok("triton", bundle, "-o", tmp_path, "--name", "m", "--bundle-at", mounted)
    version = tmp_path / "m/1"
    assert sorted(path.name for path in version.iterdir()) == ["bundle.json", "model.py"]
    with pytest.raises(InputError, match="there is no bundle at"):
        open_recorded_bundle(version)
    mounted.symlink_to(bundle)
    assert open_recorded_bundle(version).manifest == Bundle(bundle).manifest
    record = json.loads((version / "bundle.json").read_text(encoding="utf-8"))
    record["manifest_sha256"] = "0" * 64
    (version / "bundle.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="another hash"):
        open_recorded_bundle(version)


def test_force_replaces_a_model_of_ours_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    arguments = ("triton", bundle, "-o", tmp_path, "--name", "m")
    run_ok(*arguments)
    assert "pass --force" in error_line(*arguments)
    run_ok(*arguments, "--force", "--slots", 2)
    foreign = tmp_path / "other"
    (foreign / "1").mkdir(parents=True)
    (foreign / "1/model.py").write_text("mine", encoding="utf-8")
    (foreign / "config.pbtxt").write_text('name: "other"', encoding="utf-8")
    assert "was not created by this program" in error_line(*arguments[:-1], "other", "--force")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "a/b"), "the model name is 'a/b'"),
        (("--name", '"'), "the model name"),
        (("--device", "auto"), "instead of auto"),
        (("--device", "tpu"), "tpu"),
        (("--bundle-at", "here"), "must be absolute"),
        (("--variant", "int7"), "no variant 'int7'"),
    ],
)
def test_wrong_options_leave_nothing(
    bundle: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in error_line("triton", bundle, "-o", tmp_path / "models", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_repository_is_not_inside_the_bundle(bundle: Path) -> None:
    assert "is inside the bundle" in error_line("triton", bundle, "-o", bundle / "models")
