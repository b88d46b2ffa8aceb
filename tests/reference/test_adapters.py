"""LoRA adapters are merged as peft merges them; anything else is rejected by name."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemma3_export.config import EMBEDDING, HEAD
from gemma3_export.errors import InputError
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.weights import adapter, open_weights
from tests.support.tiny_models import tiny_config, write_hf_folder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TIED = tiny_config(num_hidden_layers=2, layer_types=("full_attention", "sliding_attention"))
UNTIED = replace(TIED, tie_word_embeddings=False)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn"
ONES = torch.ones(1)
IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_hf_folder(folder / "tied", TIED)
    write_hf_folder(folder / "untied", UNTIED)
    return folder


@functools.cache
def _loaded(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def trained(base: Path, rows: int | None = None, seed: int = 0, **settings: Any) -> Any:
    """Return a peft model of ``base`` whose trainable tensors are all random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings, which these tests are about
        model = copy.deepcopy(_loaded(base))
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} | settings
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter)
                # magnitudes are positive, as training leaves them
                parameter.add_(0.1 * (noise.abs() if "magnitude" in name else noise))
    return adapted.eval()


def save(adapted: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder, **options)
    return folder


def merged_by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of ``merge_and_unload`` after loading the adapter in ``folder``.

    The trained model may differ: peft sorts the patterns of ranks when it saves them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(_loaded(base)), folder)
        model = adapted.merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def edit(folder: Path, **changes: Any) -> Path:
    """Change settings of the adapter in ``folder``."""
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def rewrite(folder: Path, change: Any) -> Path:
    """Replace the tensors of the adapter in ``folder`` by ``change`` of them."""
    file = folder / WEIGHTS
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    return folder


def assert_same_logits(adapted: Any, folder: Path, base: Path | None = None) -> None:
    """Compare with the adapter's own forward pass, not merged, in float32."""
    with open_weights(None if base is None else str(base), adapter=str(folder)) as source:
        logits = load_reference(source)(IDS).logits
    with torch.no_grad():
        expected = adapted(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)


@st.composite
def settings_of_adapters(draw: st.DrawFn) -> dict[str, Any]:
    """Draw settings of an adapter."""
    modules = draw(
        st.one_of(
            st.lists(st.sampled_from((*LINEAR, "lm_head")), min_size=1, unique=True),
            st.just("all-linear"),
            st.sampled_from(
                (
                    r"model\.layers\.\d+\.mlp\.(up|down)_proj",
                    r".*\.1\..*_proj",
                    r".*(embed_tokens|lm_head|q_proj)",
                )
            ),
            st.just(["model.layers.0.self_attn.q_proj", "down_proj"]),
            st.just(["embed_tokens", "v_proj"]),
        )
    )
    settings: dict[str, Any] = {
        "r": draw(st.integers(1, 20)),
        "lora_alpha": draw(st.integers(1, 40)),
        "target_modules": modules,
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
    }
    if draw(st.booleans()):
        settings["rank_pattern"] = {"q_proj": draw(st.integers(1, 9)), r"layers\.1\..*down_proj": 7}
    if draw(st.booleans()):
        settings["alpha_pattern"] = {"^model.layers.0.self_attn.q_proj": 3, ".*proj": 11}
    if isinstance(modules, list) and draw(st.booleans()):
        settings["layers_to_transform"] = draw(st.sampled_from((0, [1], [0, 1])))
        settings["layers_pattern"] = draw(st.sampled_from((None, "layers", ["layers"])))
        # peft wants a layer in each name, unless the name is complete
        settings["target_modules"] = [name for name in modules if name in LINEAR] or ["o_proj"]
    if draw(st.booleans()):
        settings["exclude_modules"] = draw(st.sampled_from((["k_proj"], r".*\.0\.mlp\..*")))
    if draw(st.booleans()):
        settings["modules_to_save"] = draw(
            st.sampled_from((["norm"], ["embed_tokens"], ["lm_head", "embed_tokens"]))
        )
    return settings


@settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(settings_of_adapters(), st.integers(0, 10**6))
def test_merging_is_bitwise_what_peft_merges(
    bases: Path, tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any], seed: int
) -> None:
    try:
        adapted = trained(bases / "untied", seed=seed, **chosen)
    except ValueError:
        reject()  # the settings leave peft nothing to train
    folder = save(adapted, tmp_path_factory.mktemp("adapter"))
    expected = merged_by_peft(bases / "untied", folder)
    with open_weights(str(bases / "untied"), adapter=str(folder)) as source:
        assert source.config == UNTIED
        for name, shape in source.config.weight_shapes():
            merged = source.read(name)
            assert merged.shape == shape
            if name == EMBEDDING and chosen["use_dora"]:  # the norms of columns are sums
                torch.testing.assert_close(merged, expected[name], rtol=1e-6, atol=0)
            else:
                assert torch.equal(merged, expected[name]), name
            assert torch.equal(source.read(name, 3, 7), merged[3:7])


# Tied embeddings and heads: the oracle is the adapter's own forward pass, since merge_and_unload
# changes the shared matrix where only one of the two was trained.


@pytest.mark.parametrize(
    ("chosen", "is_tied"),
    [
        ({}, True),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["lm_head"], "use_dora": True, "use_rslora": True}, False),
        ({"target_modules": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        (
            {
                "target_modules": ["q_proj", "embed_tokens"],
                "ensure_weight_tying": True,
                "use_dora": True,  # of columns in the embedding, but of rows in the head
            },
            False,
        ),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["norm", "mlp"]}, True),
        ({"trainable_token_indices": [5, 9, 96]}, True),
        ({"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]}}, True),
        ({"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [6]}}, False),
        ({"trainable_token_indices": {"lm_head": [6]}}, False),
    ],
    ids=str,
)
def test_tied_embeddings_compute_what_the_unmerged_adapter_computes(
    bases: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    chosen: dict[str, Any],
    is_tied: bool,
) -> None:
    adapted = trained(bases / "tied", **chosen)
    folder = save(adapted, tmp_path / "adapter")
    with open_weights(adapter=str(folder)) as source:
        assert source.config.tie_word_embeddings is is_tied
    assert ("stores both" in caplog.text) is not is_tied
    assert_same_logits(adapted, folder)


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 97, 98, 99]},
        {"target_modules": ["embed_tokens", "up_proj"]},
    ],
    ids=str,
)
def test_an_adapter_with_added_tokens_resizes_the_model(
    bases: Path, tmp_path: Path, base: str, chosen: dict[str, Any]
) -> None:
    adapted = trained(bases / base, rows=100, **chosen)
    folder = save(adapted, tmp_path / "adapter", save_embedding_layers=True)
    if base == "untied" and "embed_tokens" in chosen.get("target_modules", ()):
        with pytest.raises(InputError, match="adapter does not have the others"):
            open_weights(adapter=str(folder))  # peft leaves out the rows of such a head
        return
    with open_weights(adapter=str(folder)) as source:
        assert source.config.vocab_size == 100
        assert source.read(EMBEDDING).shape == (100, TIED.hidden_size)
    assert_same_logits(adapted, folder)


def test_added_tokens_may_be_stored_alone(bases: Path, tmp_path: Path) -> None:
    adapted = trained(bases / "tied", rows=99, trainable_token_indices=[98, 3, 97])
    folder = save(adapted, tmp_path / "adapter", save_embedding_layers=False)
    assert not [name for name in load_file(folder / WEIGHTS) if "base_layer" in name]
    assert_same_logits(adapted, folder)


def test_added_tokens_that_the_adapter_lacks_are_not_invented(bases: Path, tmp_path: Path) -> None:
    adapted = trained(bases / "tied", rows=100, trainable_token_indices=[97, 99])
    folder = save(adapted, tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InputError, match=r"trained with 100 tokens, but .* has 97"):
        open_weights(adapter=str(folder))
    adapted = trained(bases / "tied", rows=100, modules_to_save=["embed_tokens"])
    folder = save(adapted, tmp_path / "other", save_embedding_layers=False)
    with pytest.raises(InputError, match="save_embedding_layers=True"):
        open_weights(adapter=str(folder))


def test_a_smaller_vocabulary_drops_rows(bases: Path, tmp_path: Path) -> None:
    adapted = trained(bases / "tied", rows=90)
    folder = save(adapted, tmp_path / "adapter", save_embedding_layers=True)
    with open_weights(adapter=str(folder)) as source:
        assert source.config.vocab_size == 90
    assert_same_logits(adapted, folder)


# Names and files as other programs write them


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.model.", "base_model.model.model.language_model."),  # transformers 4.52
        ("base_model.model.model.", "base_model.model.language_model.model."),  # and before
        ("base_model.model.", ""),
        ("base_model.model.", "base_model.model._orig_mod."),
        (".lora_A.", ".lora_A.default."),
        ("self_attn.", "_fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
    ],
)
def test_names_of_other_wrappers_are_known(bases: Path, tmp_path: Path, old: str, new: str) -> None:
    adapted = trained(bases / "tied", target_modules=["q_proj", "up_proj"], rank_pattern={})
    folder = save(adapted, tmp_path / "adapter")
    rewrite(folder, lambda found: {k.replace(old, new): v for k, v in found.items()})
    assert_same_logits(adapted, folder)


def test_unsloth_targets_the_language_model_by_a_regular_expression(
    bases: Path, tmp_path: Path
) -> None:
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r"\.(?:(?:k_proj|v_proj|q_proj|out_proj|o_proj|gate_proj|up_proj|down_proj)))"
    )
    adapted = trained(bases / "tied", target_modules=pattern)
    folder = save(adapted, tmp_path / "adapter")
    assert len(load_file(folder / WEIGHTS)) == 2 * 7 * TIED.num_hidden_layers
    assert_same_logits(adapted, folder)
    renamed = rewrite(
        folder,
        lambda found: {
            k.replace("model.model", "model.model.language_model"): v for k, v in found.items()
        },
    )
    assert_same_logits(adapted, renamed)


def test_tensors_of_the_vision_tower_are_left_out(bases: Path, tmp_path: Path) -> None:
    adapted = trained(bases / "tied")
    folder = save(adapted, tmp_path / "adapter")
    name = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    rewrite(folder, lambda found: found | {f"{name}.lora_A.weight": torch.ones(3, 8)})
    with open_weights(adapter=str(folder)) as source:
        assert source.skipped == (f"{name}.lora_A.weight",)
    assert_same_logits(adapted, folder)


def test_a_pickled_adapter_is_read_without_running_code(bases: Path, tmp_path: Path) -> None:
    adapted = trained(bases / "tied", use_dora=True)
    folder = save(adapted, tmp_path / "adapter", safe_serialization=False)
    assert (folder / "adapter_model.bin").is_file()
    assert_same_logits(adapted, folder)
    torch.save({"x": Path("code")}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin contains code"):
        open_weights(adapter=str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(
    bases: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    adapted = trained(bases / "tied", target_modules=["o_proj"])
    folder = save(adapted, tmp_path / "adapter")
    rewrite(folder, lambda found: {k: v.to(dtype) for k, v in found.items()})
    weights = write_hf_folder(tmp_path / "base", TIED, dtype=dtype)
    expected = merged_by_peft(tmp_path / "base", folder)  # the base is loaded in float32
    with open_weights(str(tmp_path / "base"), adapter=str(folder)) as source:
        for name, _ in source.config.weight_shapes():
            assert source.stored_dtype(name) == source.read(name).dtype == torch.float32
            assert torch.equal(source.read(name), expected[name]), name
        name = "model.layers.1.self_attn.o_proj.weight"
        assert not torch.equal(source.read(name), weights[name].float())


def test_parts_of_an_embedding_do_not_depend_on_the_rows_that_are_read(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}
    folder = save(trained(bases / "untied", **settings), tmp_path / "adapter")
    with open_weights(adapter=str(folder)) as source:
        whole = {name: source.read(name) for name in (EMBEDDING, HEAD)}
    monkeypatch.setattr(adapter, "BLOCK_BYTES", 4 * UNTIED.hidden_size * 10)
    with open_weights(adapter=str(folder)) as source:
        for name, expected in whole.items():
            parts = [source.read(name, row, min(row + 7, 97)) for row in range(0, 97, 7)]
            assert torch.equal(torch.cat(parts), source.read(name))
            torch.testing.assert_close(source.read(name), expected, rtol=1e-6, atol=1e-7)


# The base, and what a path means


def test_the_base_is_the_model_that_the_adapter_names(bases: Path, tmp_path: Path) -> None:
    adapted = trained(bases / "tied")
    folder = save(adapted, tmp_path / "adapter")
    with open_weights(adapter=str(folder)) as named, open_weights(str(folder)) as given:
        assert named.fingerprint() == given.fingerprint()
        assert named.fingerprint()["adapter"] == {"kind": "lora", "location": "adapter"}
        assert sorted(named.fingerprint()["files"]) == [CONFIG, WEIGHTS, "model.safetensors"]
    with open_weights(str(folder / WEIGHTS)) as given:
        assert given.fingerprint()["adapter"]["kind"] == "lora"
    edit(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(
        InputError, match=r"base model of .*adapter cannot be used.*gone.*--weights"
    ):
        open_weights(adapter=str(folder))
    with pytest.raises(InputError, match="cannot be used"):
        open_weights(str(folder))
    assert_same_logits(adapted, folder, base=bases / "tied")
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"names no base model; pass .* --weights"):
        open_weights(adapter=str(folder))


def test_an_adapter_beside_a_model_is_not_ignored(bases: Path, tmp_path: Path) -> None:
    adapted = trained(bases / "tied")
    folder = tmp_path / "both"
    write_hf_folder(folder, TIED)
    base = save(adapted, folder)
    with pytest.raises(InputError, match=r"both a model \(model.safetensors\) and an adapter"):
        open_weights(str(folder))
    with open_weights(str(folder / "model.safetensors")) as source:
        assert "adapter" not in source.fingerprint()
    assert_same_logits(adapted, folder, base=base)
    assert_same_logits(adapted, folder, base=folder / "model.safetensors")


def test_the_adapter_brings_its_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    folder = save(trained(tiny_folder), tmp_path / "adapter")
    with open_weights(adapter=str(folder)) as source:
        assert source.tokenizer_file() == tiny_folder / "tokenizer.json"
    shutil.copy(tiny_folder / "tokenizer.json", folder)
    with open_weights(adapter=str(folder)) as source:
        assert source.tokenizer_file() == folder / "tokenizer.json"


def padded_base(folder: Path, tokenizer: Path, rows: int) -> Path:
    """Write a model of 400 tokens with more rows, as multimodal and padded checkpoints have."""
    write_hf_folder(folder, replace(TIED, vocab_size=rows))
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("stores_base", [True, False])
def test_padding_rows_are_left_out(tiny_folder: Path, tmp_path: Path, stores_base: bool) -> None:
    base = padded_base(tmp_path / "base", tiny_folder, 416)
    adapted = trained(base, target_modules=["embed_tokens"])
    folder = save(adapted, tmp_path / "adapter")
    if not stores_base:
        rewrite(folder, remove("base_layer"))
    with open_weights(adapter=str(folder)) as source:
        assert source.config.vocab_size == 400
        logits = load_reference(source)(IDS).logits
    with torch.no_grad():
        expected = adapted(IDS).logits[..., :400]
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)


def test_added_tokens_may_take_the_place_of_padding(tiny_folder: Path, tmp_path: Path) -> None:
    base = padded_base(tmp_path / "base", tiny_folder, 416)
    adapted = trained(base, trainable_token_indices=[400, 401])
    folder = save(adapted, tmp_path / "adapter")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    tokenizer.add_tokens(["<first>", "<second>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with open_weights(adapter=str(folder)) as source:
        assert source.config.vocab_size == 402
        logits = load_reference(source)(IDS).logits
    with torch.no_grad():
        expected = adapted(IDS).logits[..., :402]
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"trained tokens are padding: 401"):
        open_weights(adapter=str(folder))


# Rejections


def remove(part: str) -> Any:
    return lambda found: {name: value for name, value in found.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("layers.1.self_attn.q_proj"), "target_modules names modules without.*layers.1"),
        (remove("layers.1.self_attn.q_proj.lora_B"), r"parts .* missing: .*q_proj \(factor_b\)"),
        (
            lambda found: found | {"base_model.model.model.layers.0.self_attn.q_proj.lora_C": ONES},
            "belong to no weight of the model: .*lora_C",
        ),
        (
            lambda found: found | {f"{LAYER}.q_proj.lora_B.bias": ONES},
            "belong to no weight of the model: .*lora_B.bias",
        ),
        (
            lambda found: found | {"base_model.model.score.weight": ONES},
            "belong to no weight of the model: .*score",
        ),
        (
            lambda found: {k.replace("layers.1", "layers.2"): v for k, v in found.items()},
            "belong to no weight of the model: .*layers.2",
        ),
        (
            lambda found: {k.replace("q_proj", "k_proj"): v for k, v in found.items()},
            "without tensors: .*q_proj",
        ),
        (
            lambda found: found | {f"{LAYER}.k_proj.lora_A.weight": ONES},
            "target_modules does not name modules that have tensors.*: .*k_proj",
        ),
        (
            lambda found: found | {f"{LAYER}.q_proj.lora_magnitude_vector": ONES},
            "do not suit the settings: .*magnitude",
        ),
        (
            lambda found: {k: v[:2] if "lora_A" in k else v for k, v in found.items()},
            r"a tensor is \[2, 48\], but the model and adapter_config.json need \[3, 48\]",
        ),
        (
            lambda found: found | {f"{LAYER}.q_proj.lora_A.default.weight": torch.ones(3, 48)},
            "tensors with one meaning differ",
        ),
        (lambda found: found | {f"{LAYER}.q_norm.weight": torch.ones(4)}, r"a tensor is \[4\]"),
    ],
)
def test_a_tensor_without_a_place_is_named(
    bases: Path, tmp_path: Path, change: Any, words: str
) -> None:
    folder = save(trained(bases / "tied"), tmp_path / "adapter")
    with pytest.raises(InputError, match=words):
        open_weights(adapter=str(rewrite(folder, change)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({"peft_type": kind}, f"{kind}.*merge_and_unload and export the result")
            for kind in ("IA3", "PROMPT_TUNING", "LOHA", "LOKR", "VERA", "ADALORA", "OFT", "NEW")
        ),
        ({"lora_bias": True}, "lora_bias is True, but Gemma 3 has no bias"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "changes the base model as well"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"target_parameters": ["weight"]}, "target_parameters is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is"),
        ({"use_something_new": 3}, "use_something_new is 3, which is not supported"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS.*not a language model"),
        ({"r": 0}, "rank 0 is not"),
        ({"r": "8"}, 'r is "8"; it must be a whole number'),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"r": 4}, r"need \[4, 48\]"),
        ({"rank_pattern": {"q_proj": 5}}, r"need \[5, 48\]"),
        ({"rank_pattern": {"(": 5}}, "not a regular expression"),
        ({"target_modules": "*"}, "not a regular expression"),
        ({"target_modules": ["q_proj", "up_proj"]}, "without tensors: .*up_proj"),
        ({"target_modules": ["k_proj"]}, "without tensors: .*k_proj"),
        ({"layers_to_transform": [0]}, "does not name modules .*layers.1"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names modules without .*lm_head"),
        ({"trainable_token_indices": [4]}, "trainable_token_indices names .*embed_tokens"),
        ({"trainable_token_indices": [4, 4]}, "repeats"),
        ({"use_dora": True}, r"parts .* missing: .*\(magnitude\)"),
    ],
    ids=str,
)
def test_settings_that_are_not_merged_are_named(
    bases: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = edit(save(trained(bases / "tied"), tmp_path / "adapter"), **changes)
    with pytest.raises(InputError, match=words):
        open_weights(adapter=str(folder))


def test_a_folder_without_an_adapter_is_rejected(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no adapter_config.json.*save_pretrained"):
        open_weights(adapter=str(bases / "tied"))
    with pytest.raises(InputError, match="is a file, not an adapter"):
        open_weights(adapter=str(bases / "tied" / "config.json"))
    save(trained(bases / "tied"), tmp_path / "run" / "second")
    with pytest.raises(InputError, match=r"pass one of its folders \(second\)"):
        open_weights(adapter=str(tmp_path / "run"))
    (tmp_path / "run" / "second" / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"has no adapter_model.* or adapter_model"):
        open_weights(adapter=str(tmp_path / "run" / "second"))


def test_a_weight_that_is_not_finite_after_merging_is_named(bases: Path, tmp_path: Path) -> None:
    folder = save(trained(bases / "tied"), tmp_path / "adapter")
    rewrite(folder, lambda found: {k: v * float("inf") for k, v in found.items()})
    with open_weights(adapter=str(folder)) as source, pytest.raises(InputError, match="q_proj"):
        load_reference(source)
