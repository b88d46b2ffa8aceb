"""Checkpoints as fine-tunes leave them are read as transformers reads them, or rejected by name."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma3_export import export_torchscript, verify
from gemma3_export.config import config_to_json
from gemma3_export.errors import InputError
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.training.model_folder import export_hf_folder
from gemma3_export.reference.weights import WeightSource, open_weights
from gemma3_export.tokenizer import load_tokenizer
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer
from tests.tokenizer.test_added_tokens import FINE_TUNED, SIZE, write_tokenizer
from tests.tokenizer.test_gguf_tokenizer import metadata_of

# transformers 5 wants a multiple of the heads as hidden size, GGUF blocks of 32.
CONFIG = tiny_config(hidden_size=64, intermediate_size=96, num_attention_heads=4)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMED = SIZE + len(FINE_TUNED)  # tokens of the tokenizer with a fine-tune's own
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_reads(source: WeightSource, weights: Weights) -> None:
    assert [name for name, _ in source.config.weight_shapes()] == list(weights)
    for name, expected in weights.items():
        assert torch.equal(source.read(name), expected), name


def logits_of(source: WeightSource, ids: torch.Tensor) -> torch.Tensor:
    return load_reference(source)(ids).logits


def assert_like_transformers(folder: Path, rows: int) -> None:
    """Compare logits with those of whatever transformers loads from ``folder``."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(4))
    with open_weights(str(folder)) as source:
        assert source.config.vocab_size == rows
        ours = logits_of(source, ids)
    theirs = model(ids).logits[..., :rows]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ours, theirs.flip(-1), atol=1e-2)


# A head of its own


@pytest.mark.parametrize("stated", [None, True, False])
def test_a_head_of_its_own_is_used_as_in_transformers(
    tmp_path: Path, stated: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tiny_weights(CONFIG)
    data = config_to_json(CONFIG) | {"tie_word_embeddings": stated}
    if stated is None:
        del data["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    head = weights[EMBEDDING].flip(0).contiguous()
    save_file(weights | {HEAD: head}, tmp_path / "model.safetensors", {"format": "pt"})
    with open_weights(str(tmp_path)) as source:
        assert not source.config.tie_word_embeddings
        assert_reads(source, weights | {HEAD: head})
    assert ("differs from the embedding" in caplog.text) == (stated is not False)
    assert_like_transformers(tmp_path, CONFIG.vocab_size)


@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("text", [None, True, False])
def test_the_top_level_of_a_multimodal_config_decides_about_tying(
    tmp_path: Path, top: bool | None, text: bool | None
) -> None:
    transformers = pytest.importorskip("transformers")
    fields = config_to_json(CONFIG)
    del fields["architectures"], fields["tie_word_embeddings"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    data: dict[str, Any] = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": fields | ({} if text is None else {"tie_word_embeddings": text}),
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "image_token_index": 96,
    } | ({} if top is None else {"tie_word_embeddings": top})
    torch.manual_seed(3)
    config = transformers.Gemma3Config.from_dict(data)
    model = transformers.Gemma3ForConditionalGeneration(config)
    if top is False:
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0) * 3)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(data))
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith(HEAD) for name in stored) == (top is False)
    with open_weights(str(tmp_path)) as source:
        assert source.config.tie_word_embeddings == (top is not False)
        assert any("vision_tower" in name for name in source.skipped)
    assert_like_transformers(tmp_path, CONFIG.vocab_size)


def test_a_head_that_is_stated_but_not_stored_is_an_error(tmp_path: Path) -> None:
    write_hf_folder(tmp_path, CONFIG)
    data = config_to_json(CONFIG) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"missing \(1\): lm_head\.weight[\s\S]*set tie_word"):
        open_weights(str(tmp_path))


# Names and files


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "module.base_model.model.", "base_model.model.language_model."]
)
def test_prefixes_of_merged_adapters_are_removed(tmp_path: Path, prefix: str) -> None:
    weights = write_hf_folder(tmp_path, CONFIG)
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert_reads(open_weights(str(tmp_path)), weights)


class Canary:
    """Write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def write_torch_shards(folder: Path, weights: Weights, count: int = 3) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    weight_map = {}
    for number in range(count):
        shard = f"pytorch_model-{number + 1:05}-of-{count:05}.bin"
        part = {name: weights[name] for name in list(weights)[number::count]}
        torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weight_map


def test_torch_shards_are_read_and_files_of_the_trainer_are_not(tmp_path: Path) -> None:
    weights = tiny_weights(CONFIG)
    write_torch_shards(tmp_path, weights)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        torch.save(Canary(tmp_path / "executed"), tmp_path / name)
    with open_weights(str(tmp_path)) as source:
        assert_reads(source, weights)
        assert len(source.fingerprint()["files"]) == 3
    assert not (tmp_path / "executed").exists()


def test_a_single_torch_file_is_found_beside_the_files_of_the_trainer(tmp_path: Path) -> None:
    weights = write_hf_folder(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    torch.save(Canary(tmp_path / "executed"), tmp_path / "training_args.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    assert_reads(open_weights(str(tmp_path)), weights)
    assert not (tmp_path / "executed").exists()


def test_damaged_torch_shards_are_errors(tmp_path: Path) -> None:
    weights = tiny_weights(CONFIG)
    weight_map = write_torch_shards(tmp_path, weights)
    second = tmp_path / "pytorch_model-00002-of-00003.bin"
    content = second.read_bytes()
    torch.save({EMBEDDING: weights[EMBEDDING]}, second)
    with pytest.raises(InputError, match=r"another shard|disagree about"):
        open_weights(str(tmp_path))
    torch.save(Canary(tmp_path / "executed"), second)
    with pytest.raises(InputError, match="contains code"):
        open_weights(str(tmp_path))
    assert not (tmp_path / "executed").exists()
    second.unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards .*pytorch_model-00002"):
        open_weights(str(tmp_path))
    second.write_bytes(content)
    index = {"weight_map": weight_map | {"model.extra": second.name}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"disagree about 1 tensors: model\.extra"):
        open_weights(str(tmp_path))


def test_a_lightning_checkpoint_is_read(tmp_path: Path) -> None:
    weights = write_hf_folder(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").unlink()
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    saved = {"epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": state, "callbacks": {}}
    torch.save(saved, tmp_path / "last.ckpt")
    for spec in (tmp_path, tmp_path / "last.ckpt"):
        assert_reads(open_weights(str(spec)), weights)


def test_json_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    weights = write_hf_folder(tmp_path, CONFIG)
    path = tmp_path / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}', encoding="utf-8-sig")
    with open_weights(str(tmp_path)) as source:
        assert_reads(source, weights)
        assert source.config.eos_token_id == (*CONFIG.eos_token_id, 9)


# Split GGUF files


def write_split_gguf(folder: Path, weights: Weights) -> list[Path]:
    import gguf

    write_gguf(folder / "whole.gguf", CONFIG, weights)
    whole = gguf.GGUFReader(folder / "whole.gguf")
    writer = gguf.GGUFWriter(folder / "parts.gguf", "gemma3", split_max_tensors=20)
    for field in whole.fields.values():
        kind = field.types[0]
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "whole.gguf").unlink()
    return sorted(folder.glob("parts-*.gguf"))


def test_a_split_gguf_is_opened_by_any_part_or_by_its_folder(tmp_path: Path) -> None:
    weights = tiny_weights(CONFIG)
    parts = write_split_gguf(tmp_path, weights)
    assert [part.name for part in parts][:1] == ["parts-00001-of-00004.gguf"]
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF")
    for spec in (tmp_path, *parts):
        with open_weights(str(spec)) as source:
            assert torch.equal(source.read(EMBEDDING), weights[EMBEDDING])
            name = "model.layers.4.mlp.down_proj.weight"
            assert torch.equal(source.read(name), weights[name])
            assert source.config.num_hidden_layers == 5
            assert len(source.fingerprint()["files"]) == 4


def test_parts_that_are_missing_renamed_or_mixed_are_errors(tmp_path: Path) -> None:
    parts = write_split_gguf(tmp_path, tiny_weights(CONFIG))
    third = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(InputError, match="1 of 4 parts are missing: parts-00003-of-00004"):
        open_weights(str(parts[0]))
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(InputError, match=r"parts-00003-of-00004\.gguf: split\.no .* \(1, 4\)"):
        open_weights(str(parts[0]))
    parts[2].write_bytes(third)
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"split\.count is 4.*merge"):
        open_weights(str(renamed))


# Ollama's files


def ollama_metadata(**more: Any) -> dict[str, Any]:
    """Return the metadata that Ollama's converter writes otherwise than llama.cpp's."""
    return {
        "rope.freq_base": None,
        "rope.freq_base_swa": None,
        "rope.scaling.type": None,
        "rope.scaling.factor": None,
        "attention.layer_norm_rms_epsilon": None,
        "rope.global.freq_base": CONFIG.rope_theta,
        "rope.local.freq_base": CONFIG.rope_local_base_freq,
        "vision.block_count": 27,
        "vision.attention.layer_norm_epsilon": 1e-6,
        "mm.tokens_per_image": 256,
    } | more


def write_ollama_gguf(path: Path, metadata: dict[str, Any], monkeypatch: Any) -> Weights:
    import gguf

    config = replace(CONFIG, vocab_size=700)
    weights = tiny_weights(config)

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        def write_header_to_file(self, *args: Any) -> None:
            self.add_bool("tokenizer.ggml.add_padding_token", False)
            self.add_tensor("v.blk.0.attn_q.weight", torch.zeros(3, 32).numpy())
            self.add_tensor("mm.mm_input_projection.weight", torch.zeros(3, 32).numpy())
            super().write_header_to_file(*args)

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    write_gguf(path, config, weights, metadata=metadata)
    return weights


def test_ollamas_gguf_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sha256-abc.gguf"
    weights = write_ollama_gguf(path, ollama_metadata(), monkeypatch)
    with open_weights(str(path)) as source:
        assert source.config.rope_theta == CONFIG.rope_theta
        assert source.config.rope_local_base_freq == CONFIG.rope_local_base_freq
        assert source.config.rms_norm_eps == 1e-6
        assert source.config.rope_scaling_factor == 1.0
        assert source.skipped == ("mm.mm_input_projection.weight", "v.blk.0.attn_q.weight")
        assert torch.equal(source.read(EMBEDDING), weights[EMBEDDING])


def test_the_rope_scaling_that_ollama_leaves_out_is_that_of_the_published_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.gguf"
    write_ollama_gguf(path, ollama_metadata(context_length=131_072), monkeypatch)
    with open_weights(str(path)) as source:
        assert source.config.rope_scaling_factor == 8.0
    assert "does not state its RoPE scaling" in caplog.text


def test_two_names_of_one_rope_base_must_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    metadata = ollama_metadata() | {"rope.freq_base": CONFIG.rope_theta + 1}
    write_ollama_gguf(path, metadata, monkeypatch)
    with pytest.raises(InputError, match=r"rope\.global\.freq_base contradict each other"):
        open_weights(str(path))


# Padded embeddings


def padded_folder(folder: Path, rows: int, added: list[dict[str, Any]], **changes: Any) -> Weights:
    """Write a folder whose embedding has ``rows`` rows, and a tokenizer with ``added`` tokens."""
    config = replace(CONFIG, vocab_size=rows, **changes)
    weights = write_hf_folder(folder, config)
    write_tokenizer(folder, added)
    return weights


@pytest.mark.parametrize("multiple", [1, 64, 128, 256])
def test_rows_without_a_token_are_left_out_of_a_padded_folder(
    tmp_path: Path, multiple: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = -(-NAMED // multiple) * multiple
    weights = padded_folder(tmp_path, rows, FINE_TUNED)
    with open_weights(str(tmp_path)) as source:
        assert source.config.vocab_size == NAMED
        assert torch.equal(source.read(EMBEDDING), weights[EMBEDDING][:NAMED])
        file = source.tokenizer_file()
        assert file is not None
        load_tokenizer(file).check_vocab_size(source.config.vocab_size)
    assert_like_transformers(tmp_path, NAMED)
    assert not caplog.text


def test_many_rows_without_a_token_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    padded_folder(tmp_path, NAMED + 257, FINE_TUNED)
    assert open_weights(str(tmp_path)).config.vocab_size == NAMED
    assert "the last 257 of 962 embedding rows have no token" in caplog.text


def test_a_tokenizer_of_another_model_leaves_no_rows_out(tmp_path: Path) -> None:
    padded_folder(tmp_path, 3 * NAMED, FINE_TUNED)
    assert open_weights(str(tmp_path)).config.vocab_size == 3 * NAMED
    with pytest.raises(InputError, match="use the tokenizer of the model"):
        load_tokenizer(tmp_path).check_vocab_size(3 * NAMED)
    padded_folder(tmp_path, NAMED - 1, FINE_TUNED)
    assert open_weights(str(tmp_path)).config.vocab_size == NAMED - 1
    with pytest.raises(InputError, match="has no embedding for some of them"):
        load_tokenizer(tmp_path).check_vocab_size(NAMED - 1)


@pytest.mark.parametrize("pad", [0, 1, 106, SIZE, NAMED - 1, 760])
def test_any_row_may_pad_texts(tmp_path: Path, pad: int) -> None:
    padded_folder(tmp_path, 768, FINE_TUNED, pad_token_id=pad, eos_token_id=(pad,))
    with open_weights(str(tmp_path)) as source:
        assert source.config.pad_token_id == pad
        assert source.config.eos_token_id == (pad,)
        assert source.config.vocab_size == max(NAMED, pad + 1)


@pytest.mark.parametrize("multiple", [64, 128, 256])
@pytest.mark.parametrize("pad", [0, 1, SIZE + 3])
def test_rows_without_a_token_are_left_out_of_a_padded_gguf(
    tmp_path: Path, multiple: int, pad: int
) -> None:
    import gguf

    rows = -(-NAMED // multiple) * multiple
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", FINE_TUNED))
    metadata = metadata_of(tiny_gemma_tokenizer(SIZE))
    metadata["tokens"] += [token["content"] for token in FINE_TUNED]
    metadata["token_type"] += [3 if token["special"] else 4 for token in FINE_TUNED]
    metadata["tokens"] += [f"[PAD{number}]" for number in range(NAMED, rows)]
    metadata["token_type"] += [5] * (rows - NAMED)
    metadata["scores"] += [-1000.0] * (rows - SIZE)
    config = replace(CONFIG, vocab_size=rows)
    path = tmp_path / "m.gguf"

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        def write_header_to_file(self, *args: Any) -> None:
            self.add_tokenizer_model("llama")
            self.add_token_list(metadata["tokens"])
            self.add_token_scores(metadata["scores"])
            self.add_token_types(metadata["token_type"])
            super().write_header_to_file(*args)

    weights = tiny_weights(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        eos = (SIZE + 3, 106)
        write_gguf(path, replace(config, pad_token_id=pad, eos_token_id=eos), weights)
    with open_weights(str(path)) as source:
        assert source.config.vocab_size == NAMED
        assert source.config.pad_token_id == pad
        assert source.config.eos_token_id == (1, 106, SIZE + 3)
        assert torch.equal(source.read(EMBEDDING), weights[EMBEDDING][:NAMED])
        file = source.tokenizer_file()
    assert file == path
    text = "a <|im_start|>user\nthe<tool>sea<|im_end|>"
    assert load_tokenizer(path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("new", [0, 1, 7])
def test_new_tokens_in_the_padding_of_a_multimodal_folder_are_kept(
    tmp_path: Path, new: int
) -> None:
    """The official multimodal embedding has 64 spare rows, in which fine-tunes put tokens."""
    config = tiny_config(vocab_size=262_208, hidden_size=8)
    weights = tiny_weights(config)
    save_file(weights, tmp_path / "model.safetensors")
    text = config_to_json(config) | {"eos_token_id": 1}
    if new:
        text["pad_token_id"] = 262_144 + new
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    )
    added = [{"id": 262_144 + i, "content": f"<new{i}>"} for i in range(1, new + 1)]
    added.insert(0, {"id": 262_144, "content": "<image_soft_token>"})
    random.Random(2).shuffle(added)
    vocab = {str(i): i for i in range(262_144)}
    content = {"added_tokens": added, "model": {"vocab": vocab, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with open_weights(str(tmp_path)) as source:
        expected = 262_144 + (new + 1 if new else 0)
        assert source.config.vocab_size == expected
        assert torch.equal(source.read(EMBEDDING), weights[EMBEDDING][:expected])


def test_another_tokenizer_may_name_rows_that_the_weights_own_does_not(tmp_path: Path) -> None:
    """`--tokenizer` brings the tokens of a fine-tune whose folder has the base's tokenizer."""
    weights = padded_folder(tmp_path / "in", 768, [])
    write_tokenizer(tmp_path / "tokenizer", FINE_TUNED)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    with open_weights(str(tmp_path / "in")) as source:
        assert source.config.vocab_size == SIZE
        assert source.read(EMBEDDING).shape == (SIZE, 64)
        export_hf_folder(source, tmp_path / "out", tokenizer=tokenizer)
    with open_weights(str(tmp_path / "out")) as source:
        assert source.config.vocab_size == NAMED
        assert torch.equal(source.read(EMBEDDING), weights[EMBEDDING][:NAMED])
    export_torchscript(tmp_path / "in", tmp_path / "b", tokenizer=tokenizer, verify=False)
    report = verify(tmp_path / "b", runtime="torchscript", weights=str(tmp_path / "in"), threads=1)
    assert report.passed
    assert report.model.vocab_size == NAMED


@pytest.mark.parametrize("row", [SIZE - 1, SIZE], ids=["named by both", "named by --tokenizer"])
def test_a_head_that_differs_in_one_row_is_used(tmp_path: Path, row: int) -> None:
    """Whichever row it is: transformers 5 unties such a model as well."""
    weights = padded_folder(tmp_path / "in", 768, [])
    head = weights[EMBEDDING].clone()
    head[row] += 1
    save_file({**weights, HEAD: head}, tmp_path / "in" / "model.safetensors")
    write_tokenizer(tmp_path / "tokenizer", FINE_TUNED)
    with open_weights(str(tmp_path / "in")) as source:
        assert source.config.tie_word_embeddings == (row == SIZE)
        assert (HEAD in source.skipped) == (row == SIZE)
        tokenizer = load_tokenizer(tmp_path / "tokenizer")
        export_hf_folder(source, tmp_path / "out", tokenizer=tokenizer)
    with open_weights(str(tmp_path / "out")) as source:
        assert not source.config.tie_word_embeddings
        assert torch.equal(source.read(HEAD), head[:NAMED])


# What is not a Gemma 3 language model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "not merged"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
        ("base_model.model.lm_head.modules_to_save.weight", "merge_and_unload"),
        ("score.weight", "classifier.*Optimum"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "fp8"),
        ("model.layers.0.per_layer_input_gate.weight", "Gemma 3n"),
        ("dense.0.weight", "EmbeddingGemma"),
    ],
)
def test_foreign_weights_are_named_with_the_remedy(tmp_path: Path, name: str, message: str) -> None:
    weights = write_hf_folder(tmp_path, CONFIG)
    save_file(weights | {name: torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"unexpected \(1\)[\s\S]*{message}"):
        open_weights(str(tmp_path))


def test_fp8_weights_are_named_with_the_remedy(tmp_path: Path) -> None:
    weights = write_hf_folder(tmp_path, CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"F8_E4M3: 8-bit floats.*bfloat16 checkpoint"):
        open_weights(str(tmp_path))
