"""The main workflow on the real Gemma 3 270M: weights to ONNX to text, on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gemma3_export.cli import command_line
from gemma3_export.parity import VerifyOptions

pytestmark = pytest.mark.real_weights
QUICK = {"decode_steps": 16, "greedy_steps": 4}
SERIES = ("The days of the week are Monday, Tuesday,", "One, two, three, four,")


def run_ok(*arguments: object) -> Result:
    result = CliRunner().invoke(command_line, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="module", params=["quick", pytest.param("full", marks=pytest.mark.slow)])
def real_export(request, real_gguf, tmp_path_factory) -> tuple[Path, str]:
    """The bundle for ONNX Runtime, and the output of the export.

    The quick check decodes fewer steps, half of them before the window's edge, as in the full one.
    """
    output = tmp_path_factory.mktemp("real") / "270m"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "quick":
            chosen = VerifyOptions.for_budget
            patch.setattr(
                VerifyOptions,
                "for_budget",
                lambda *given, **named: replace(chosen(*given, **named), **QUICK),
            )
        return output, run_ok("onnx", "--weights", real_gguf, "-o", output).stdout


def test_the_export_is_proven(real_export):
    bundle, printed = real_export
    assert "parity: passed" in printed
    facts = json.loads(run_ok("inspect", bundle, "--json").stdout)
    assert facts["model"]["parameters"] == 268_098_176
    assert facts["graphs"][0]["verified"]
    # the embedding is stored once
    assert facts["files"]["onnx/model.onnx_data"]["size_bytes"] < 1.01 * 268_098_176 * 4


def test_it_continues_well_known_series(real_export):
    prompts = [part for text in SERIES for part in ("--prompt", text)]
    printed = run_ok("generate", real_export[0], *prompts, "--max-new-tokens", 8, "--json").stdout
    days, numbers = [json.loads(line)["text"] for line in printed.splitlines()]
    assert days.startswith(" Wednesday, Thursday, Friday")
    assert numbers.startswith(" five, six, seven")


def test_a_batch_gives_the_same_tokens_as_single_prompts(real_export):
    def tokens(*texts: str) -> list[list[int]]:
        prompts = [part for text in texts for part in ("--prompt", text)]
        arguments = ("generate", real_export[0], *prompts, "--max-new-tokens", 12, "--json")
        return [json.loads(line)["token_ids"] for line in run_ok(*arguments).stdout.splitlines()]

    assert tokens(*SERIES) == [*tokens(SERIES[0]), *tokens(SERIES[1])]
