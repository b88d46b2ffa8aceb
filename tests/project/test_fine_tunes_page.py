"""The commands of docs/fine-tunes.md run in their order, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from tests.support.command_line import run_ok
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "fine-tunes.md"
BASE = "google/gemma-3-270m-it"
LAYERS = {"num_hidden_layers": 1, "layer_types": ("full_attention",), "vocab_size": 400}


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_all_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    for name in ("base", "my-fine-tune"):
        write_hf_folder(tmp_path / name, tiny_config(**LAYERS), seed=len(name))
        tiny_gemma_tokenizer(400).save(tmp_path / name)
    widths = {"hidden_size": 64, "intermediate_size": 96}
    config = tiny_config(**LAYERS, **widths)
    write_gguf(tmp_path / "my-fine-tune-Q8_0.gguf", config, tiny_weights(config), "Q8_0")
    (tmp_path / "texts.txt").write_text("the rest is the sea", encoding="utf-8")
    (code,) = blocks("python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code.replace(BASE, "base"), str(PAGE), "exec"), {})
    checkpoint = tmp_path / "outputs" / "checkpoint-60"  # as a Trainer leaves it
    shutil.copytree(tmp_path / "my-lora", checkpoint)
    torch.save({"state": {}}, checkpoint / "optimizer.pt")
    (checkpoint / "training_args.bin").write_bytes(b"a pickle")
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "unsloth/gemma-3-270m-it-unsloth-bnb-4bit"
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
    commands = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(commands) >= 10
    made = []
    for command in commands:
        program, *arguments = shlex.split(command.replace(BASE, "base"), comments=True)
        assert program == "gemma3-export"
        if arguments[0] == "generate":
            arguments += ["--max-new-tokens", "4"]
        if "-o" in arguments:
            made.append(arguments[arguments.index("-o") + 1])
            if arguments[0] == "onnx" and made[-1] != "merged":  # one proof is enough here
                arguments.append("--no-verify")
        run_ok(*arguments)
    for name in made:
        assert (tmp_path / name / "config.json").is_file()
    assert (tmp_path / "small" / "tokenizer.json").is_file()
