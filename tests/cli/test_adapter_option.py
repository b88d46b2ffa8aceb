"""``--adapter``: exports, checks and conversions of a base with a LoRA adapter merged in."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import gemma3_export
from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.tokenizer import TokenizerSettings
from tests.support.command_line import error_line, run, run_ok, run_rejected
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(2, 20)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "base"
    write_hf_folder(folder, tiny_config(num_hidden_layers=1, layer_types=("full_attention",)))
    generation = {"do_sample": True, "temperature": 0.25}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Return a DoRA adapter of ``base`` that also trained the norms."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", use_dora=True, modules_to_save=["norm"]
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter).abs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(base.parent / "adapter")
    torch.save(adapted.eval()(IDS).logits.detach(), base.parent / "expected.pt")
    return base.parent / "adapter"


@pytest.fixture(scope="module")
def expected(adapter: Path) -> torch.Tensor:
    return torch.load(adapter.parent / "expected.pt")


@pytest.mark.parametrize(
    "command", ["onnx", "torchscript", pytest.param("pt2", marks=pytest.mark.slow)]
)
def test_every_format_holds_the_merged_weights(
    base: Path, adapter: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    done = run_ok(command, "--adapter", adapter, "-o", out, "--threads", 1)
    assert f"parameters (dora adapter {adapter} merged with {base})" in done.stdout
    assert "parity: passed" in done.stdout
    source = Bundle(out).manifest.source
    assert source["adapter"] == {"kind": "dora", "location": "adapter"}
    assert {"adapter_config.json", "adapter_model.safetensors"} < source["files"].keys()
    assert "adapter: kind dora, location adapter" in run_ok("inspect", out).stdout
    verify = ("verify", out, "--runtime", command, "--threads", 1)
    run_ok(*verify, "--weights", base, "--adapter", adapter)
    assert run(*verify, "--weights", base).exit_code == 1


def test_to_hf_writes_what_peft_computes(
    adapter: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    run_ok("to-hf", "--adapter", adapter, "-o", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.float32
    assert model.generation_config.temperature == 0.25
    torch.testing.assert_close(model(IDS).logits, expected, rtol=2e-5, atol=2e-5)
    run_ok("to-hf", "--weights", adapter, "--dtype", "bf16", "-o", tmp_path / "half")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(half.state_dict()[name], model.state_dict()[name].bfloat16())


def test_python_takes_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    options = {"verify": False, "threads": 1}
    bundle = gemma3_export.export_onnx(base, tmp_path / "out", adapter=adapter, **options).path
    assert gemma3_export.verify(bundle, adapter=str(adapter), threads=1).passed
    assert gemma3_export.verify(bundle, weights=base, adapter=adapter, threads=1).passed
    with gemma3_export.open_weights(base, adapter=adapter) as source:
        assert Bundle(bundle).manifest.source == source.fingerprint()
        with pytest.raises(InputError, match="pass the adapter to open_weights"):
            gemma3_export.export_onnx(source, tmp_path / "other", adapter=adapter)
    with pytest.raises(InputError, match="adapter"):
        gemma3_export.export_onnx(base, tmp_path / "other", adapter=5)


def test_a_format_of_the_base_alone_is_not_added_to_a_merged_bundle(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    export = ("--no-verify", "-o", tmp_path / "out", "--threads", 1)
    run_ok("torchscript", "--adapter", adapter, *export)
    assert "other weights" in error_line("pt2", "--weights", base, *export)


def test_a_rejected_adapter_leaves_no_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = tmp_path / "adapter"
    broken.mkdir()
    for file in adapter.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    for command in ("onnx", "to-hf"):
        out = tmp_path / command
        assert "merge_and_unload" in error_line(command, "--adapter", broken, "-o", out)
        assert not out.exists()
    assert "--weights, --adapter" in run_rejected("to-hf", "-o", tmp_path / "out")


def test_a_format_with_another_tokenizer_is_not_added_to_a_bundle(tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 1, "layer_types": ("full_attention",)}
    model, other, out = tmp_path / "model", tmp_path / "other", tmp_path / "out"
    write_hf_folder(model, tiny_config(vocab_size=400, **layers))
    tiny_gemma_tokenizer(400).save(model)
    tiny_gemma_tokenizer(400).with_settings(
        TokenizerSettings(templates={"default": "{{ messages[0].content }}"})
    ).save(other)
    export = ("--weights", model, "--no-verify", "-o", out, "--threads", 1)
    run_ok("torchscript", *export)
    assert "another tokenizer" in error_line("pt2", *export, "--tokenizer", other)
    tiny_gemma_tokenizer(399).save(other)
    assert "another tokenizer" in error_line("pt2", *export, "--tokenizer", other)
    assert {graph.runtime for graph in Bundle(out).manifest.graphs} == {"torchscript"}
    tiny_gemma_tokenizer(400).save(other)
    run_ok("pt2", *export, "--tokenizer", other)
    assert {graph.runtime for graph in Bundle(out).manifest.graphs} == {"torchscript", "pt2"}


def test_a_tokenizer_for_rows_that_an_adapter_added_can_be_passed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = {"num_hidden_layers": 1, "layer_types": ("full_attention",)}
    model, adapter, more = tmp_path / "model", tmp_path / "adapter", tmp_path / "more"
    write_hf_folder(model, tiny_config(vocab_size=400, **layers))
    tiny_gemma_tokenizer(400).save(model)
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.resize_token_embeddings(403, mean_resizing=False)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(adapter, save_embedding_layers=True)
    expected = adapted.eval()(IDS).logits
    export = ("to-hf", "--adapter", adapter, "--dtype", "fp32")
    run_ok(*export, "-o", tmp_path / "without")
    assert "403 embedding rows, but no tokenizer" in caplog.text
    caplog.clear()
    tiny_gemma_tokenizer(403).save(more)
    run_ok(*export, "--tokenizer", more, "-o", tmp_path / "with")
    assert not caplog.text
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=2e-5, atol=2e-5)


def test_a_tokenizer_may_name_rows_of_the_base_of_an_adapter(tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 1, "layer_types": ("full_attention",)}
    model, adapter, more = tmp_path / "model", tmp_path / "adapter", tmp_path / "more"
    write_hf_folder(model, tiny_config(vocab_size=420, **layers))
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(adapter)
    expected = adapted.eval()(IDS).logits[..., :407]
    tiny_gemma_tokenizer(400).save(model)  # after loading: only 400 of the 420 rows are named
    tiny_gemma_tokenizer(407).save(more)
    options = ("--tokenizer", more, "--no-verify", "--threads", 1)
    run_ok("torchscript", "--adapter", adapter, *options, "-o", tmp_path / "out")
    assert Bundle(tmp_path / "out").config.vocab_size == 407
    with gemma3_export.load(tmp_path / "out", runtime="torchscript", device="cpu") as loaded:
        logits = torch.as_tensor(loaded.logits(IDS[0].tolist()))
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
    check = ("verify", tmp_path / "out", "--runtime", "torchscript", "--adapter", adapter)
    run_ok(*check, "--threads", 1)
