"""Inputs that were read wrongly without a word, and right ones that were rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma3_export
from gemma3_export.config import config_to_json
from gemma3_export.config.gguf_config import config_from_gguf
from gemma3_export.errors import InputError
from gemma3_export.gguf_file import open_gguf
from gemma3_export.parity import render_html, render_terminal
from gemma3_export.parity.report.model import share
from gemma3_export.reference.training.model_folder import export_hf_folder
from gemma3_export.reference.training.runs import resume_training
from gemma3_export.reference.weights import open_weights
from gemma3_export.tokenizer import Tokenizer
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer


@pytest.mark.parametrize("options", [{}, {"dtype": "int8", "block_size": 16}, {"dtype": "bf16"}])
def test_a_pruned_layer_is_exported_and_proven(tmp_path: Path, options: dict[str, object]) -> None:
    write_hf_folder(tmp_path / "pruned", tiny_config())
    (file,) = (tmp_path / "pruned").glob("*.safetensors")
    weights = load_file(file)
    pruned = [name for name in weights if ".layers.1." in name and "proj" in name]
    assert pruned
    save_file(weights | {name: torch.zeros_like(weights[name]) for name in pruned}, file)
    done = gemma3_export.export_onnx(tmp_path / "pruned", tmp_path / "out", threads=1, **options)
    assert done.verified
    report = gemma3_export.verify(done.path, threads=1)
    assert "PASS" in render_terminal(report).upper()
    assert "<svg" in render_html(report)


def test_an_error_where_there_is_no_room_for_one_is_beyond_the_limit() -> None:
    assert share(0.0, 0.0) == 0.0
    assert share(1e-9, 0.0) == float("inf")
    assert share(1.0, 2.0) == 0.5


def test_a_lazy_negation_of_a_checkpoint_keeps_its_sign(tmp_path: Path) -> None:
    config = tiny_config()
    weights = tiny_weights(config)
    name = "model.layers.0.self_attn.q_proj.weight"
    negated = torch._neg_view(-weights[name])  # the stored bytes have the other sign
    assert negated.is_neg()
    assert negated.is_contiguous()
    torch.save(weights | {name: negated}, tmp_path / "model.pt")
    config_path = tmp_path / "config.json"
    config_path.write_text(json.dumps(config_to_json(config)), encoding="utf-8")
    with open_weights(str(tmp_path / "model.pt"), config_path=config_path) as source:
        export_hf_folder(source, tmp_path / "hf", dtype=None)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    torch.testing.assert_close(written[name], weights[name])


def test_bpe_dropout_does_not_make_encodings_random(tmp_path: Path) -> None:
    tiny_gemma_tokenizer(400).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    expected = Tokenizer.from_file(path).encode("the the the sea of the sea")
    data["model"]["dropout"] = 0.9
    path.write_text(json.dumps(data), encoding="utf-8")
    tokenizer = Tokenizer.from_file(path)
    text = "the the the sea of the sea"
    assert {tuple(tokenizer.encode(text)) for _ in range(20)} == {tuple(expected)}
    assert len({tuple(tokenizer.encode_ordinary(text)) for _ in range(20)}) == 1
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert not saved["model"]["dropout"]


def test_gguf_tensors_that_share_bytes_are_corrupt(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "model.gguf"
    write_gguf(path, config, tiny_weights(config))
    whole = open_gguf(path)
    one, other = sorted(whole.tensors, key=lambda tensor: tensor.data_offset)[:2]
    start = min(tensor.data_offset for tensor in whole.tensors)
    data = path.read_bytes()
    old = (other.data_offset - start).to_bytes(8, "little")
    at = data.index(other.name.encode()) + len(other.name)
    at = data.index(old, at)
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    with pytest.raises(InputError, match=rf"{one.name} and {other.name}|share bytes"):
        open_gguf(path)


@pytest.mark.parametrize(("kind", "factor"), [(None, 8.0), ("linear", 8.0), ("none", 1.0)])
def test_a_rope_factor_without_a_type_is_linear_as_in_llama_cpp(
    tmp_path: Path, kind: str | None, factor: float
) -> None:
    config = tiny_config()
    path = tmp_path / "model.gguf"
    scaling = {"rope.scaling.type": kind, "rope.scaling.factor": 8.0}
    write_gguf(path, config, tiny_weights(config), metadata=scaling)
    assert config_from_gguf(open_gguf(path)).rope_scaling_factor == factor


def test_a_run_of_another_version_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"format_version": 99, "options": {}}')
    with pytest.raises(InputError, match="format version 99"):
        resume_training(tmp_path)
