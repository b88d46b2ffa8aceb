"""The main workflow on the real Gemma 3 270M: weights to ONNX to text, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gemma3_export.cli import command_line

pytestmark = pytest.mark.real_weights
SERIES = ("The days of the week are Monday, Tuesday,", "One, two, three, four,")


def run_ok(*arguments: object) -> Result:
    result = CliRunner().invoke(command_line, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def real_export(real_gguf, tmp_path_factory) -> Path:
    """The bundle for ONNX Runtime, without its proof, which takes minutes."""
    output = tmp_path_factory.mktemp("real") / "270m"
    run_ok("onnx", "--weights", real_gguf, "-o", output, "--no-verify")
    return output


@pytest.mark.slow
def test_an_export_is_proven(real_gguf, tmp_path):
    bundle = tmp_path / "270m"
    assert "parity: passed" in run_ok("onnx", "--weights", real_gguf, "-o", bundle).stdout
    facts = json.loads(run_ok("inspect", bundle, "--json").stdout)
    assert facts["graphs"][0]["verified"]


def test_the_embedding_is_stored_once(real_export):
    facts = json.loads(run_ok("inspect", real_export, "--json").stdout)
    assert facts["model"]["parameters"] == 268_098_176
    assert facts["files"]["onnx/model.onnx_data"]["size_bytes"] < 1.01 * 268_098_176 * 4


def test_it_continues_well_known_series(real_export):
    prompts = [part for text in SERIES for part in ("--prompt", text)]
    printed = run_ok("generate", real_export, *prompts, "--max-new-tokens", 8, "--json").stdout
    days, numbers = [json.loads(line)["text"] for line in printed.splitlines()]
    assert days.startswith(" Wednesday, Thursday, Friday")
    assert numbers.startswith(" five, six, seven")


def test_a_batch_gives_the_same_tokens_as_single_prompts(real_export):
    def tokens(*texts: str) -> list[list[int]]:
        prompts = [part for text in texts for part in ("--prompt", text)]
        arguments = ("generate", real_export, *prompts, "--max-new-tokens", 12, "--json")
        return [json.loads(line)["token_ids"] for line in run_ok(*arguments).stdout.splitlines()]

    assert tokens(*SERIES) == [*tokens(SERIES[0]), *tokens(SERIES[1])]
