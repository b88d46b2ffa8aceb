"""The benchmark of drafts: its prompts, its turns, and how it judges the goals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import speculation
from gemma3_export.api.exporting import export_onnx, open_weights
from tests.support.fake_runtime import ScriptedRuntime
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a bundle with room for the prompts, which a small vocabulary makes long."""
    parent = tmp_path_factory.mktemp("long context")
    config = tiny_config(vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    write_hf_folder(parent / "weights", config)
    tiny_gemma_tokenizer(VOCAB_SIZE).save(parent / "weights")
    with open_weights(str(parent / "weights")) as source:
        return export_onnx(source, parent / "bundle", verify=False).path


def rounds_of(*ratios: float) -> list[Any]:
    """Return rounds with these ratios, all with the same number of tokens."""
    return [
        speculation.Turns(
            tokens=10,
            plain_s=ratio,
            drafting_s=1.0,
            drafted_tokens=0,
            accepted_tokens=0,
            texts=1,
            equal_texts=1,
        )
        for ratio in ratios
    ]


def test_all_groups_are_measured_and_all_texts_compared(bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--threads", "1", "--rounds", "2", "--new-tokens", "24", "--report", str(report)]
    result = CliRunner().invoke(speculation.main, [str(bundle), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text(encoding="utf-8"))
    assert [group["group"] for group in found["groups"]] == list(speculation.GOALS)
    cases = {
        (group["group"], case["name"]): case["rounds"]
        for group in found["groups"]
        for case in group["cases"]
    }
    assert len(cases) == len(speculation.all_cases()) == 16
    for group, name in cases:
        assert group in result.output
        assert name in result.output
    rounds = [one for both in cases.values() for one in both]
    assert len(rounds) == 32
    assert all(one["tokens"] == 23 and one["equal_texts"] == one["texts"] == 1 for one in rounds)
    assert all(one["plain_s"] > 0 and one["drafting_s"] > 0 for one in rounds)
    assert sum(one["accepted_tokens"] for one in rounds) > 0, "nothing was drafted"
    assert result.output.count("8 of 8 texts the same with drafts") == 2
    assert "16 of 16 texts the same with drafts" in result.output


def test_only_the_second_turn_drafts(monkeypatch: Any) -> None:
    """They take turns, and only the second one drafts."""
    drafts: list[int] = []
    complete = speculation.complete

    def watched(*arguments: Any) -> Any:
        done = complete(*arguments)
        drafts.append(done.drafted_tokens)
        return done

    monkeypatch.setattr(speculation, "complete", watched)
    runtime = ScriptedRuntime({2: b"abcabcabcabcabcabcabcabcabcabc"})
    turns = speculation.take_turns(runtime, [2], speculation.GREEDY, 24, 16)
    assert drafts[0] == 0 < drafts[1] == turns.drafted_tokens
    assert turns.accepted_tokens > 5
    assert turns.equal_texts == 1


def test_a_different_text_is_noticed(monkeypatch: Any) -> None:
    answers = iter([b"abcabcabcabcabc", b"abcabcabcabXabc"])
    complete = speculation.complete

    def unlike(_: Any, *arguments: Any) -> Any:
        return complete(ScriptedRuntime({2: next(answers)}), *arguments)

    monkeypatch.setattr(speculation, "complete", unlike)
    assert speculation.take_turns(None, [2], speculation.GREEDY, 14, 16).equal_texts == 0


def test_copies_are_in_their_prompts() -> None:
    """The prompt contains what a faithful model writes, except for the changed names."""
    for module, name, new_name, asked, old, new in speculation.EDITS:
        source = speculation.function_source(module, name)
        prompt = speculation.edit_prompt(module, name, new_name, asked, old, new)
        assert source.startswith(f"def {name}(")
        assert prompt.startswith(source)
        assert f"`{new}`" in asked
        assert f"`{old}`" in asked
        begun = prompt[len(source) :].partition(f"def {new_name}(")[2]
        assert new in begun
        assert begun.count("\n") == speculation.BEGUN_LINES
    for topic in speculation.TOPICS:
        passage, begun = speculation.quote_prompt(topic).rsplit('\n\n"', 1)
        assert passage.startswith(begun)
        assert len(passage) > 300


def test_free_text_has_nothing_to_copy() -> None:
    free = [case for case in speculation.all_cases() if case.group == "free text"]
    assert {case.sampling for case in free} == {speculation.GREEDY, speculation.DRAWN}
    for case in free:
        words = case.prompt.split()
        pairs = list(itertools.pairwise(words))
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    ("group", "cases", "ratio", "is_met"),
    [
        ("quotes", [(1.0, 1.0, 1.0), (3.0, 3.0, 3.0)], 2.0, True),  # as a whole
        ("code edits", [(1.0, 1.0, 9.0), (2.5, 2.5, 9.0)], 1.75, False),  # by the median
        ("free text", [(2.0, 2.0, 2.0), (0.9, 0.9, 1.0)], 0.9, False),  # each by itself
        ("free text", [(2.0, 2.0, 2.0), (0.8, 0.95, 1.0)], 0.95, True),
    ],
)
def test_goals_are_judged(
    group: str,
    cases: list[tuple[float, ...]],
    ratio: float,
    is_met: bool,
) -> None:
    verdict = speculation.judge(group, [rounds_of(*ratios) for ratios in cases])
    assert verdict["ratio"] == pytest.approx(ratio)
    assert verdict["is_met"] is is_met
    assert verdict["goal"] == (0.95 if group == "free text" else 1.8)
