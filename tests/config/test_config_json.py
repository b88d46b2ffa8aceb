"""Test that all dialects of config.json are read and that no key is dropped silently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma3_export.config import (
    SIZES,
    Gemma3Config,
    config_from_json,
    config_to_json,
    default_layer_types,
    load_config,
    preset,
)
from gemma3_export.config.hugging_face import BENIGN_KEYS, TEXT_KEYS, WRAPPER_KEYS
from gemma3_export.errors import InputError
from tests.support.tiny_models import tiny_config

transformers = pytest.importorskip("transformers")

OFFICIAL_4B = {  # sparse, like the published file
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
ANCESTOR_270M = {
    "vocab_size": 262_144,
    "context_length": 32_768,
    "emb_dim": 640,
    "n_heads": 4,
    "n_layers": 18,
    "hidden_dim": 2048,
    "head_dim": 256,
    "qk_norm": True,
    "n_kv_groups": 1,
    "rope_local_base": 10_000.0,
    "rope_base": 1_000_000.0,
    "sliding_window": 512,
    "layer_types": list(default_layer_types(18)),
    "dtype": "torch.bfloat16",
    "query_pre_attn_scalar": 256,
}


def read(data: object) -> Gemma3Config:
    return config_from_json(data, where="test")


def flat(**changes: Any) -> dict[str, Any]:
    data = config_to_json(tiny_config()) | changes
    return {key: value for key, value in data.items() if value != "drop"}


@pytest.mark.parametrize("size", SIZES)
def test_config_json_round_trips(size: str) -> None:
    config = preset(size).config
    assert read(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize("overrides", [{}, {"rope_scaling_factor": 1.0}, {"eos_token_id": (9,)}])
def test_transformers_reads_our_config_json(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = tiny_config(**overrides)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Gemma3TextConfig"
    full = theirs.rope_parameters["full_attention"]
    assert full["rope_theta"] == config.rope_theta
    assert full.get("factor", 1.0) == config.rope_scaling_factor
    assert theirs.rope_parameters["sliding_attention"] == {
        "rope_type": "default",
        "rope_theta": config.rope_local_base_freq,
    }
    assert tuple(theirs.layer_types) == config.layer_types
    assert theirs.query_pre_attn_scalar == config.query_pre_attn_scalar
    theirs.save_pretrained(tmp_path / "again")
    assert load_config(tmp_path / "again") == config


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_multimodal_configs_of_transformers_are_read(tmp_path: Path, scaling: Any) -> None:
    text = {"num_hidden_layers": 7, "rope_scaling": scaling, "vocab_size": 300}
    transformers.Gemma3Config(text_config=text).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert config.layer_types == default_layer_types(7)
    assert (config.vocab_size, config.sliding_window, config.hidden_size) == (300, 4096, 2304)
    assert config.rope_scaling_factor == (4.0 if scaling else 1.0)


def test_defaults_are_those_of_transformers() -> None:
    theirs = transformers.Gemma3TextConfig()
    assert read({"model_type": "gemma3_text"}) == read(theirs.to_dict())


def test_sparse_official_wrapper_is_the_4b_preset() -> None:
    assert read(OFFICIAL_4B) == preset("4b-it").config


@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_layer_pattern_dialects(key: str) -> None:
    config = read(flat(layer_types="drop", **{key: 3}))
    assert config.layer_types == default_layer_types(5, 3)


def test_layer_types_take_precedence_over_the_private_pattern() -> None:
    assert read(flat(_sliding_window_pattern=6)) == tiny_config()


def test_nested_rope_parameters() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
    }
    drop = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"), "drop")
    assert read(flat(rope_parameters=nested, **drop)) == tiny_config()
    assert read(flat(rope_parameters=nested)) == tiny_config(), "both dialects, in agreement"


def test_ancestor_dictionary_is_the_270m_preset() -> None:
    assert read(ANCESTOR_270M) == preset("270m").config
    without = {k: v for k, v in ANCESTOR_270M.items() if k not in ("layer_types", "rope_base")}
    assert read(without | {"query_pre_attn_scalar": None}) == preset("270m").config


def test_ancestor_gpt2_vocabulary_uses_its_last_token_as_eos() -> None:
    config = read(ANCESTOR_270M | {"vocab_size": 50_257})
    assert (config.eos_token_id, config.bos_token_id) == ((50_256,), 50_256)


def test_eos_ids_of_the_generation_config_are_added(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flat(eos_token_id=1)))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5], "top_k": 64}')
    assert load_config(tmp_path).eos_token_id == (1, 5)
    assert load_config(tmp_path / "config.json") == replace(tiny_config(), eos_token_id=(1, 5))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(InputError, match="eos_token_id"):
        load_config(tmp_path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_bidirectional_attention": True}, "EmbeddingGemma"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "without a factor"),
    ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "contradict"),
    ({"rope_scaling": {"rope_type": "default", "factor": 3.0}}, "drop one"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "beta": 1}}, "extra keys"),
    ({"rope_scaling": "linear"}, "must be an object"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "full_attention"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "keep one dialect"),
    (
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "only full attention",
    ),
    ({"sliding_window_pattern": 6}, "contradict each other"),
    (
        {"layer_types": "drop", "sliding_window_pattern": 6, "_sliding_window_pattern": 5},
        "contradict each other",
    ),
    ({"layer_types": "drop", "sliding_window_pattern": 0}, "at least 1"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ({"layer_types": ["full_attention"] * 4 + ["chunked"]}, "chunked"),
    ({"layer_types": [1] * 5}, "list of strings"),
    ({"layer_types": []}, "layer_types has 0 entries"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: "),
    ({"auto_map": {"AutoModel": "x.py"}}, "custom model code"),
    ({"model_type": "gemma"}, "Gemma 1 is another architecture than Gemma 3"),
    ({"model_type": "gemma2"}, "Gemma 2 is another architecture than Gemma 3"),
    ({"model_type": "gemma3n"}, "Gemma 3n is another architecture than Gemma 3"),
    ({"model_type": "gemma3n_text"}, "Gemma 3n is another architecture than Gemma 3"),
    ({"model_type": "gemma4"}, "Gemma 4 is another architecture than Gemma 3"),
    ({"model_type": "gemma4_unified"}, "Gemma 4 is another architecture than Gemma 3"),
    ({"model_type": "t5gemma"}, "T5Gemma is an encoder-decoder"),
    ({"model_type": "t5gemma2"}, "T5Gemma is an encoder-decoder"),
    ({"model_type": "embedding_gemma2"}, "use sentence-transformers"),
    ({"architectures": ["Gemma3TextForSequenceClassification"]}, "a classification head"),
    ({"architectures": ["Gemma3ForSequenceClassification"]}, "a classification head"),
    ({"use_bidirectional_attention": True}, "use sentence-transformers"),
    ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes; load it in transformers"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "model.dequantize()"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "llm-compressor"),
    ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ; take the checkpoint"),
    ({"quantization_config": {"quant_method": "awq"}}, "AWQ; take the checkpoint"),
    ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "8-bit floats with scales"),
    ({"quantization_config": {"quant_method": "new"}}, "'new'; take the unquantized checkpoint"),
    ({"model_type": "llama"}, "'llama'"),
    ({"model_type": "gemma3"}, "no text_config"),
    ({"model_type": None}, "model_type is missing"),
    ({"num_local_experts": 4, "zeta": 1}, "num_local_experts = 4, zeta = 1"),
    ({"sliding_window": None}, "sliding_window is null"),
    ({"hidden_size": "48"}, "hidden_size is '48'"),
    ({"hidden_size": 48.0}, "hidden_size is 48.0"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"num_hidden_layers": 2**30}, "num_hidden_layers"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is too large"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": [1]}, "rope_theta"),
    ({"eos_token_id": 1000}, "1000"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_unsupported_keys_and_values_are_named(changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=r"^test: ") as caught:
        read(flat(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": False}, "qk_norm is False"),
        ({"emb_dim": None}, "emb_dim"),
        ({"moe": True}, "moe = True"),
        ({"n_layers": "18"}, "num_hidden_layers is '18'"),
    ],
)
def test_ancestor_dictionary_is_checked(changes: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(ANCESTOR_270M | changes)
    assert message in str(caught.value)


def test_contradictions_in_multimodal_configs_are_errors() -> None:
    text = OFFICIAL_4B["text_config"]
    assert isinstance(text, dict)
    for changes, message in [
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"text_config": text | {"model_type": "llama"}}, "llama"),
        ({"text_config": [1]}, "text_config must be a JSON object"),
        ({"audio_config": {}, "extra": 1}, "extra"),
    ]:
        with pytest.raises(InputError, match=message):
            read(OFFICIAL_4B | changes)


def test_every_gemma_of_transformers_is_named_as_another_model() -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    others = {kind for kind in auto.CONFIG_MAPPING_NAMES if "gemma" in kind}
    others -= {"gemma3", "gemma3_text"}
    assert {"gemma2", "gemma4", "t5gemma", "paligemma"} <= others
    for kind in sorted(others):
        advice = complaint(flat(model_type=kind)).partition("are supported: ")[2]
        assert "use " in advice, kind


@pytest.mark.parametrize("key", ["max_seq_length", "model_max_length"])
def test_lengths_of_trainers_and_tokenizers_are_no_shapes(key: str) -> None:
    assert read(flat(**{key: 2048})) == read(flat())


def complaint(data: object) -> str:
    """Return the error message for ``data``, or an empty string if it is valid."""
    try:
        read(data)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("long", ["x" * 5000, ["x" * 5000], {"x" * 5000: 1}, [-1] * 5000], ids=type)
def test_long_values_are_shortened_in_messages(long: object) -> None:
    """Put a long value under every known key, at every level."""
    whole = config_to_json(tiny_config())
    keys = {*TEXT_KEYS, *WRAPPER_KEYS, *BENIGN_KEYS, *whole, "x" * 5000, "qk_norm", "n_layers"}
    places: list[dict[str, object]] = [whole | {key: long} for key in sorted(keys)]
    for key in ("rope_type", "type", "factor", "rope_theta", "x"):
        kind = {"rope_type": "linear", "factor": 8.0, key: long}
        places.append(whole | {"rope_scaling": kind})
        for name in ("full_attention", "sliding_attention"):
            places.append(whole | {"rope_scaling": None, "rope_parameters": {name: kind}})
    messages = [message for data in places if (message := complaint(data))]
    assert len(messages) > 30
    assert max(map(len, messages)) < 500


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"x"', "[" * 100_000, '{"a": ' + "9" * 5000]
)
def test_invalid_config_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(path)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_config(tmp_path)
