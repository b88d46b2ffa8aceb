"""The chat example of docs/training.md: from JSONL to an answer of the exported model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from gemma3_export.reference.training.token_data import open_token_data
from tests.support.command_line import run_ok
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
# The model is tiny and untrained, so it needs a higher rate and its own context.
MORE = "--learning-rate 5e-3 --warmup-steps 5 --context-length 48 --eval-interval 50 --device cpu"


def test_the_chat_example_of_the_documentation_teaches_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Chat data\n")[2]
    (rows,) = re.findall(r"```json\n(.*?)```", section.partition("\n## ")[0], flags=re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", section.partition("\n## ")[0], flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_gemma_tokenizer(400)
    folder = tmp_path / "gemma-3-270m-it"
    write_hf_folder(
        folder,
        tiny_config(
            vocab_size=400,
            eos_token_id=(1, 106),
            num_hidden_layers=2,
            layer_types=("sliding_attention", "full_attention"),
        ),
    )
    tokenizer.save(folder)
    (tmp_path / "chats.jsonl").write_text(rows * 20, encoding="utf-8")

    data, train, export, generate = (shlex.split(line)[1:] for line in commands.splitlines())
    result = run_ok(*data)
    chats = open_token_data(tmp_path / "chats")
    assert chats.meta.learned_tokens is not None
    assert "answers, and only they are learned" in result.stdout
    learned, total = chats.meta.learned_tokens["train"], chats.meta.tokens["train"]
    trained = run_ok(*train, *MORE.split()).stdout
    assert trained.startswith(f"data: {learned:,} of {total:,} tokens are answers (")
    run_ok(*export, "--no-verify")
    answer = run_ok(*generate, "--temperature", 0, "--max-new-tokens", 12, "--json")
    (found,) = [json.loads(line) for line in answer.stdout.splitlines()]
    assert found["text"] == "Graz."
    assert found["finish_reason"] == "stop"
