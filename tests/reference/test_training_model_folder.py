"""Test that runs and exported folders are valid Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gemma3_export.cli import command_line
from gemma3_export.cli.train_command import OPTIONS
from gemma3_export.errors import InputError
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.training import model_folder
from gemma3_export.reference.training.documents import LocalFiles
from gemma3_export.reference.training.model_folder import export_hf_folder
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.preparation import prepare_tokens
from gemma3_export.reference.training.runs import RECORD, train
from gemma3_export.reference.training.token_data import open_token_data
from gemma3_export.reference.weights import open_weights
from gemma3_export.tokenizer import load_tokenizer
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer
from tests.support.token_folders import quick_options, small_config, write_config

IDS = torch.tensor([[2, 5, 9, 30, 7, 7, 150, 299, 11, 4, 8, 21]])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"story {number}: the sea is wide. " * 20)
    source = LocalFiles([folder])
    prepare_tokens(source, tiny_gemma_tokenizer(300), folder / "tokens", validation_fraction=0.2)
    return folder / "tokens"


@pytest.fixture(scope="module")
def run(tokens: Path) -> Path:
    config = write_config(tokens.parent / "config.json", small_config(vocab_size=300))
    run = tokens.parent / "run"
    lines: list[str] = []
    options = quick_options(sample_interval=4, sample_prompt="the sea", sample_tokens=8)
    train(tokens, run, options, config_path=config, report=lines.append)
    samples = [line for line in lines if line.startswith("sample: 'the sea")]
    assert len(samples) == 2
    return run


def transformers_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(IDS).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def test_transformers_loads_the_run_with_equal_logits(run: Path) -> None:
    with open_weights(str(run)) as source, torch.no_grad():
        ours = load_reference(source)(IDS).logits
    torch.testing.assert_close(transformers_logits(run), ours, rtol=1e-4, atol=1e-4)


def test_transformers_loads_the_tokenizer_of_the_run(run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(run)
    assert theirs("the sea")["input_ids"] == load_tokenizer(run).encode("the sea")


def test_run_folder_and_record_are_complete(run: Path, tokens: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "log.csv",
        RECORD,
    }
    record = json.loads((run / RECORD).read_text())
    assert record["data"] == open_token_data(tokens).meta.to_json()
    assert record["result"]["steps"] == 8
    assert record["result"]["best_validation_loss"] > 0
    assert TrainOptions.from_json(record["options"]).steps == 8


def test_a_fine_tuned_run_keeps_the_sampling_defaults_of_its_weights(
    tokens: Path, tmp_path: Path
) -> None:
    weights, run = tmp_path / "weights", tmp_path / "run"
    write_hf_folder(weights, small_config(vocab_size=300))
    tiny_gemma_tokenizer(300).save(weights)
    defaults = {"temperature": 0.7, "suppress_tokens": [299]}
    (weights / "generation_config.json").write_text(json.dumps(defaults))
    with open_weights(str(weights)) as source:
        train(tokens, run, quick_options(steps=1), source=source, report=lambda line: None)
    written = json.loads((run / "generation_config.json").read_text())
    assert {key: written[key] for key in defaults} == defaults
    assert "top_k" not in written  # not Gemma's


def test_loss_curve_is_a_png(run: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["folder", "gguf", "torch"])
def test_to_hf_writes_any_source_with_equal_logits(tmp_path: Path, kind: str) -> None:
    config = tiny_config(vocab_size=300, query_pre_attn_scalar=24)
    weights = tiny_weights(config)
    if kind == "folder":
        write_hf_folder(tmp_path / "in", config)
        spec = tmp_path / "in"
    elif kind == "gguf":
        spec = tmp_path / "in.gguf"
        pytest.importorskip("gguf")
        write_gguf(spec, config, weights)
    else:
        spec = tmp_path / "in.pt"
        torch.save(weights, spec)
    config_path = write_config(tmp_path / "config.json", config)
    arguments = ["to-hf", "--weights", str(spec), "-o", str(tmp_path / "out")]
    if kind != "folder":
        tiny_gemma_tokenizer(300).save(tmp_path / "tokenizer")
        arguments += ["--config", str(config_path), "--tokenizer", str(tmp_path / "tokenizer")]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    with open_weights(str(spec), config_path=config_path) as source, torch.no_grad():
        ours = load_reference(source)(IDS).logits
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), ours, rtol=1e-4, atol=1e-4)


def test_to_hf_shards_large_models(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20_000)
    with open_weights(str(run)) as source:
        export_hf_folder(source, tmp_path / "out", dtype=torch.bfloat16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    with open_weights(str(tmp_path / "out")) as shards, open_weights(str(run)) as source:
        for name, _ in source.config.weight_shapes():
            assert torch.equal(shards.read(name), source.read(name).bfloat16())
    transformers_logits(tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "torch"])
def test_fine_tuning_starts_from_the_given_weights(tokens: Path, tmp_path: Path, kind: str) -> None:
    config = tiny_config(vocab_size=300)
    if kind == "folder":
        write_hf_folder(tmp_path / "in", config)
        tiny_gemma_tokenizer(300).save(tmp_path / "in")
        spec = tmp_path / "in"
    else:
        spec = tmp_path / "in.pt"
        torch.save(tiny_weights(config), spec)
    options = quick_options(steps=1, learning_rate=1e-9, min_learning_rate=0.0, warmup_steps=0)
    config_path = write_config(tmp_path / "config.json", config)
    with open_weights(str(spec), config_path=config_path) as source:
        train(tokens, tmp_path / "run", options, source=source, report=lambda line: None)
        with open_weights(str(tmp_path / "run")) as tuned:
            assert tuned.config.layer_types == config.layer_types
            for name, _ in config.weight_shapes():
                torch.testing.assert_close(tuned.read(name), source.read(name), atol=1e-6, rtol=0)


def test_fine_tuning_with_another_tokenizer_is_an_error(tokens: Path, tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "in", tiny_config(vocab_size=310))
    tiny_gemma_tokenizer(310).save(tmp_path / "in")
    with (
        open_weights(str(tmp_path / "in")) as source,
        pytest.raises(InputError, match="another tokenizer than that of"),
    ):
        train(tokens, tmp_path / "run", quick_options(), source=source, report=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_command_trains_and_prints_the_next_command(tokens: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", small_config(vocab_size=300))
    base = ["train", str(tokens), "--config", str(config), "-o", str(tmp_path / "run")]
    small = ["--steps", "2", "--batch-size", "2", "--context-length", "16", "--device", "cpu"]
    result = CliRunner().invoke(command_line, [*base, *small])
    assert result.exit_code == 0, result.output
    assert "gemma3-export onnx --weights" in result.output
    result = CliRunner().invoke(command_line, [*base, "--force", "--batch-size", "100000"])
    assert result.exit_code == 2
    assert "give more text, or lower --batch-size" in result.output
    result = CliRunner().invoke(command_line, ["train", "--resume", "x", "--steps", "3"])
    assert result.exit_code == 2
    result = CliRunner().invoke(command_line, ["train", "--resume", str(tmp_path / "nowhere")])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "highest", "lowest"),
    [
        (["--size", "demo"], 6e-3, 6e-4),
        (["--config", "CONFIG"], 1e-3, 1e-4),
        (["--weights", "demo"], 2e-5, 2e-6),
        (["--weights", "demo", "--learning-rate", "1e-4"], 1e-4, 1e-5),
    ],
)
def test_default_learning_rate_depends_on_the_initial_weights(
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    highest: float,
    lowest: float,
) -> None:
    seen: list[TrainOptions] = []

    def noting(data_path, run, options, **_):
        seen.append(options)
        raise InputError("seen")

    monkeypatch.setattr("gemma3_export.reference.training.runs.train", noting)
    config = str(write_config(tmp_path / "config.json", small_config(vocab_size=300)))
    arguments = [config if argument == "CONFIG" else argument for argument in arguments]
    CliRunner().invoke(command_line, ["train", str(tokens), "-o", str(tmp_path / "r"), *arguments])
    assert seen[0].learning_rate == highest
    assert seen[0].min_learning_rate == pytest.approx(lowest)


def test_command_offers_every_option_of_the_trainer() -> None:
    offered = {name.removeprefix("--").replace("-", "_") for name, _, _ in OPTIONS}
    assert offered == set(TrainOptions().to_json())
