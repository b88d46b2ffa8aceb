"""``genai_config.json`` describes the graph beside it; onnxruntime-genai itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from gemma3_export.bundle import GENAI_CONFIG, Bundle
from gemma3_export.bundle.genai_config import genai_config_to_json
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.reference.weights.source import RandomSource
from tests.support.exported_bundles import TARGETS, exported_bundle, source_of
from tests.support.tiny_models import tiny_config

ONE_LAYER = tiny_config(num_hidden_layers=1, layer_types=("full_attention",))


def described(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / GENAI_CONFIG).read_text(encoding="utf-8"))
    return data


def names(group: dict[str, str], layers: int) -> set[str]:
    """Return what the format strings of a group of inputs or outputs stand for."""
    return {
        value % layer if "%d" in value else value
        for value in group.values()
        for layer in range(layers)
    }


@pytest.mark.parametrize("target", TARGETS)
def test_its_names_and_sizes_are_those_of_the_graph(target: str) -> None:
    bundle = exported_bundle(target)
    model = described(bundle)["model"]
    decoder = model["decoder"]
    graph = onnx.load(bundle / decoder["filename"], load_external_data=False).graph
    optional = {tensor.name for tensor in graph.initializer}
    layers = decoder["num_hidden_layers"]
    assert names(decoder["inputs"], layers) == {v.name for v in graph.input} - optional
    assert names(decoder["outputs"], layers) == {v.name for v in graph.output}
    past = next(v for v in graph.input if v.name == decoder["inputs"]["past_key_names"] % 0)
    extents = [dim.dim_value for dim in past.type.tensor_type.shape.dim]
    assert (extents[1], extents[3]) == (decoder["num_key_value_heads"], decoder["head_size"])
    logits = next(v for v in graph.output if v.name == decoder["outputs"]["logits"])
    assert logits.type.tensor_type.shape.dim[2].dim_value == model["vocab_size"]
    embedding = dict(source_of().config.weight_shapes())["model.embed_tokens.weight"]
    assert (model["vocab_size"], decoder["hidden_size"]) == embedding
    assert model["type"] == json.loads((bundle / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_cache_is_shared_only_where_attention_extends_it_in_place(target: str) -> None:
    bundle = exported_bundle(target)
    graph = onnx.load(bundle / "onnx" / "model.onnx", load_external_data=False).graph
    extends = any(node.op_type == "GroupQueryAttention" for node in graph.node)
    assert described(bundle)["search"]["past_present_share_buffer"] == extends


def test_special_tokens_and_sampling_are_those_of_the_generation_config() -> None:
    bundle = exported_bundle("ort")
    expected = json.loads((bundle / "generation_config.json").read_text())
    found = described(bundle)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert found["model"][name] == expected.pop(name), name
    assert found["search"] | expected == found["search"]


def test_settings_that_it_cannot_read_and_tokens_that_are_missing_are_left_out() -> None:
    graph = Bundle(exported_bundle("ort")).graph("onnx")
    tokens = {"bos_token_id": 2, "eos_token_id": None, "pad_token_id": 0}
    other = {"temperature": None, "top_k": 5, "watermarking_config": {}}
    data = genai_config_to_json(ONE_LAYER, graph, tokens | other)
    assert "eos_token_id" not in data["model"]
    assert set(data["search"]) == {"top_k", "max_length", "past_present_share_buffer"}


def test_the_default_length_of_a_long_context_does_not_allocate_all_of_it() -> None:
    graph = Bundle(exported_bundle("ort")).graph("onnx")
    tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    for context, length in ((131_072, 8192), (256, 256)):
        config = tiny_config(max_position_embeddings=context)
        data = genai_config_to_json(config, graph, tokens)
        assert data["model"]["context_length"] == context
        assert data["search"]["max_length"] == length


def test_only_bundles_with_an_onnx_graph_have_one_and_its_hash_is_recorded(tmp_path: Path) -> None:
    source = RandomSource(ONE_LAYER, 3)
    export_bundle(source, tmp_path / "b", TorchScriptWriter())
    assert not (tmp_path / "b" / GENAI_CONFIG).exists()
    export_bundle(source, tmp_path / "b", OnnxWriter())
    assert GENAI_CONFIG in Bundle(tmp_path / "b").manifest.files
