"""Weights that run without an export, and the runtime of a bundle that has one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gemma3_export
from gemma3_export import InputError
from gemma3_export.api.exporting import export_torchscript
from gemma3_export.config import config_to_json
from tests.support.command_line import error_line, run_ok, run_rejected
from tests.support.exported_bundles import made_once
from tests.support.tiny_models import tiny_config, write_hf_folder

ARGUMENTS = ("--prompt", "the sea", "--max-new-tokens", 12)


@pytest.fixture(scope="module")
def archive(tiny_folder: Path) -> Path:
    """Return a bundle with TorchScript alone."""
    return made_once(
        "torchscript-only", lambda path: export_torchscript(tiny_folder, path, verify=False)
    )


def test_a_folder_of_weights_gives_the_text_of_its_export(tiny_folder, ort_bundle):
    result = run_ok("generate", tiny_folder, *ARGUMENTS)
    assert result.stdout == run_ok("generate", ort_bundle, *ARGUMENTS).stdout
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert f"faster: gemma3-export onnx --weights {tiny_folder} -o DIR" in note


def test_weights_give_the_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(vocab_size=97, rms_norm_eps=3e-5)
    write_hf_folder(tmp_path / "weights", config, seed=5)
    ids = [2, 17, 96, 4, 33]
    ours = gemma3_export.load(tmp_path / "weights").logits(ids)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "weights").eval()
    with torch.inference_mode():
        theirs = peer(torch.tensor([ids])).logits[0].float().numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_pytorch_file_with_a_config_beside_it_runs(tmp_path):
    config = tiny_config(vocab_size=97)
    state = write_hf_folder(tmp_path / "weights", config, seed=6)
    alone = tmp_path / "alone"
    alone.mkdir()
    torch.save(state, alone / "model.pt")
    (alone / "config.json").write_text(json.dumps(config_to_json(config)), encoding="utf-8")
    ids = [2, 17, 96]
    model = gemma3_export.load(alone / "model.pt")
    assert np.array_equal(model.logits(ids), gemma3_export.load(tmp_path / "weights").logits(ids))
    assert model.options.runtime == "reference"


def test_a_relative_folder_is_not_mistaken_for_a_name(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").symlink_to(tiny_folder)  # a name that means other weights to --weights
    assert gemma3_export.load("demo").config == gemma3_export.load(tiny_folder).config


def test_a_bundle_with_one_runtime_runs_it(archive, ort_bundle):
    model = gemma3_export.load(archive)
    assert model.runtime.info.name == "torchscript"
    assert run_ok("generate", archive, *ARGUMENTS).stdout == (
        run_ok("generate", ort_bundle, *ARGUMENTS).stdout
    )
    assert gemma3_export.load(ort_bundle).options.runtime == "onnx"


def test_what_weights_cannot_do_is_an_error(tiny_folder, tmp_path):
    assert "the onnx runtime needs one" in error_line(
        "generate", tiny_folder, *ARGUMENTS, "--runtime", "onnx"
    )
    assert "no manifest to check" in error_line("generate", tiny_folder, *ARGUMENTS, "--check")
    assert "not by reference" in run_rejected(
        "generate", tiny_folder, *ARGUMENTS, "--share-weights"
    )
    line = error_line("generate", tmp_path, *ARGUMENTS)
    assert "is not a gemma3-export bundle (no manifest.json)" in line
    assert "has no model.safetensors" in line
    assert "does not exist" in error_line("generate", tmp_path / "nowhere", *ARGUMENTS)
    with pytest.raises(InputError, match="is not a bundle"):
        _ = gemma3_export.load(tiny_folder).bundle
