"""Bundles and Hugging Face folders of the same weights describe them with the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma3_export.api.exporting import open_weights
from gemma3_export.bundle import write_hf_metadata
from gemma3_export.config import load_config
from gemma3_export.exporters.bundle_writer import export_bundle, tokenizer_of
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.reference.training.model_folder import export_hf_folder
from gemma3_export.reference.weights.source import RandomSource
from tests.support.chat_templates import CHATML, write_tokenizer
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("eos_token_id", [(1,), (1, 7)])
def test_onnx_and_to_hf_write_the_same_metadata(
    tmp_path: Path, eos_token_id: tuple[int, ...]
) -> None:
    config = tiny_config(
        num_hidden_layers=1,
        layer_types=("full_attention",),
        vocab_size=300,
        eos_token_id=eos_token_id,
    )
    source, tokenizer = RandomSource(config, 3), tiny_gemma_tokenizer(300)
    bundle, folder = tmp_path / "bundle", tmp_path / "folder"
    export_bundle(source, bundle, OnnxWriter(), tokenizer=tokenizer)
    export_hf_folder(source, folder, tokenizer=tokenizer)
    for name in FILES:
        assert (bundle / name).read_text() == (folder / name).read_text(), name
    assert load_config(folder) == config


@pytest.mark.parametrize(("eos_token_id", "written"), [((1,), 1), ((1, 7), [1, 7]), ((), None)])
def test_generation_config_has_special_tokens_and_gemmas_sampling(
    tmp_path: Path, eos_token_id: tuple[int, ...], written: object
) -> None:
    write_hf_metadata(tmp_path, tiny_config(eos_token_id=eos_token_id), None)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 2,
        "eos_token_id": written,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def test_the_template_settings_and_sampling_of_a_fine_tune_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_tokenizer(folder, "chatml", eos_token="<|im_end|>", model_max_length=77)
    config = tiny_config(
        num_hidden_layers=1, layer_types=("full_attention",), vocab_size=602, eos_token_id=(1,)
    )
    write_hf_folder(folder, config)
    generation = {"eos_token_id": [1, 601], "temperature": 0.3, "top_k": 5, "do_sample": True}
    others = {"cache_implementation": "hybrid", "transformers_version": "4.50.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation | others))
    with open_weights(str(folder)) as source:
        export_hf_folder(source, tmp_path / "folder")
        bundle = tmp_path / "bundle"
        export_bundle(source, bundle, OnnxWriter(), tokenizer=tokenizer_of(source))
    for made in (tmp_path / "folder", bundle):
        written = json.loads((made / "tokenizer_config.json").read_text())
        assert written["chat_template"] == CHATML
        assert written["eos_token"] == "<|im_end|>"
        assert written["model_max_length"] == 77
        expected = {"bos_token_id": 2, "pad_token_id": 0} | generation
        assert json.loads((made / "generation_config.json").read_text()) == expected
        assert load_config(made).eos_token_id == (1, 601)


def test_transformers_reads_the_generation_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_hf_metadata(tmp_path, tiny_config(), None)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.do_sample, theirs.top_k) == ([1, 7], True, 64)


def test_config_json_names_a_version_whose_tokenizers_transformers_4_57_trusts(
    tmp_path: Path,
) -> None:
    write_hf_metadata(tmp_path, tiny_config(), None)
    version = json.loads((tmp_path / "config.json").read_text())["transformers_version"]
    assert tuple(map(int, version.split("."))) <= (4, 57, 2)  # as 4.57 compares it
    assert load_config(tmp_path) == tiny_config()
