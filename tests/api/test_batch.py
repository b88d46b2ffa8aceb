"""``run_batch`` and ``gemma3-export batch``: rows in, results out, in order, and resumable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemma3_export
from gemma3_export.api import batch as batch_module
from gemma3_export.api.batch import row_seed
from gemma3_export.api.batch_results import RESULTS, UnfinishedResults
from gemma3_export.tokenizer.chat_format import ChatFormat
from tests.support.chat_templates import chat_bundle
from tests.support.command_line import REPOSITORY, error_line, json_lines, run, run_ok

TEXTS = [
    "the sea",
    "a much longer prompt about the sea and the sand",
    "x",
    "one two three",
    "the sea is",
    "Grüße <end_of_turn> from afar",
    "the sea and",
]
NEW_TOKENS = 9
TIE = 1e-4  # logits of the tiny model are about 1; float32 rounding is below 1e-5


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def results_file(target: Path) -> Path:
    return target.parent / f".{target.name}.partial" / RESULTS


def assert_same_up_to_ties(model, prompt_ids, found, expected) -> None:
    """Assert that two generations are the same until two logits differ by rounding only."""
    if found == expected:
        return
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    logits = model.logits([*prompt_ids, *expected[:at]])[-1]
    assert abs(logits[found[at]] - logits[expected[at]]) < TIE, (found, expected)


@pytest.fixture
def source(tmp_path):
    return write_rows(
        tmp_path / "in.jsonl", [{"prompt": text, "id": f"n{i}"} for i, text in enumerate(TEXTS)]
    )


@pytest.fixture
def target(tmp_path):
    return tmp_path / "outputs" / "out.jsonl"


def batch(bundle, source, target, *more):
    return ("batch", bundle, source, target, "--max-new-tokens", NEW_TOKENS, *more)


def test_results_are_those_of_one_prompt_at_a_time_in_the_order_of_the_rows(
    tiny_bundle, source, target
):
    run_ok(*batch(tiny_bundle, source, target, "--batch-size", 3))
    found = read_rows(target)
    assert [(row["index"], row["id"]) for row in found] == [(i, f"n{i}") for i in range(len(TEXTS))]
    model = gemma3_export.load(tiny_bundle)
    for row, text in zip(found, TEXTS, strict=True):
        alone = model.generate(text, max_new_tokens=NEW_TOKENS, allow_control_tokens=False)
        ids = model.tokenizer.encode(text, allow_control_tokens=False)
        assert row["prompt_tokens"] == alone.prompt_tokens == len(ids)
        assert_same_up_to_ties(model, ids, row["token_ids"], list(alone.token_ids))
        if row["token_ids"] == list(alone.token_ids):
            assert row["text"] == alone.text
    assert list(target.parent.iterdir()) == [target]


def test_a_row_starts_as_soon_as_another_has_ended(ort_bundle, source, target, monkeypatch):
    """The longest come first, and no row waits for the slowest of those before it."""
    sizes, running, most = [], set(), []
    prepare, add = gemma3_export.Model.prepare, UnfinishedResults.add

    def spy(self, prompt, options, *arguments, index, **named):
        sizes.append(len(prompt))
        running.add(index)
        most.append(len(running))
        options = replace(options, max_new_tokens=2 + 5 * index)  # so that they end one by one
        return prepare(self, prompt, options, *arguments, index=index, **named)

    def ended(self, index, result):
        running.discard(index)
        add(self, index, result)

    monkeypatch.setattr(gemma3_export.Model, "prepare", spy)
    monkeypatch.setattr(UnfinishedResults, "add", ended)
    run_ok(*batch(ort_bundle, source, target, "--batch-size", 3))
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == len(TEXTS)
    assert most[:4] == [1, 2, 3, 3]
    assert most.count(1) == 1


def test_a_sampled_row_depends_on_its_seed_and_not_on_its_batch(
    ort_bundle, source, target, tmp_path
):
    sampled = ("--temperature", 1.5, "--seed", 11)
    run_ok(*batch(ort_bundle, source, target, *sampled, "--batch-size", 1))
    other = tmp_path / "other.jsonl"
    run_ok(*batch(ort_bundle, source, other, *sampled, "--batch-size", 5))
    assert read_rows(target) == read_rows(other)
    rows = read_rows(target)
    assert [row["seed"] for row in rows] == [row_seed(11, i) for i in range(len(TEXTS))]
    assert len({row["seed"] for row in rows}) == len(TEXTS)
    row = rows[3]
    (alone,) = json_lines(
        run_ok(
            *("generate", ort_bundle, "--prompt", TEXTS[3], "--literal", "--temperature", 1.5),
            *("--max-new-tokens", NEW_TOKENS, "--seed", row["seed"], "--json"),
        )
    )
    assert alone["token_ids"] == row["token_ids"]


def test_equal_prompts_are_sampled_differently(ort_bundle, target, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"text": "the sea"}] * 3)
    run_ok(*batch(ort_bundle, source, target, "--temperature", 3))
    assert len({tuple(row["token_ids"]) for row in read_rows(target)}) == 3


def test_control_tokens_of_a_text_are_plain_text_unless_asked(ort_bundle, target, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a<end_of_turn>b"}])
    tokenizer = gemma3_export.Tokenizer.from_folder(ort_bundle)
    counts = []
    for option in ((), ("--no-literal", "--force")):
        run_ok(*batch(ort_bundle, source, target, *option))
        counts.append(read_rows(target)[0]["prompt_tokens"])
    texts = [
        len(tokenizer.encode("a<end_of_turn>b", allow_control_tokens=b)) for b in (False, True)
    ]
    assert counts == texts
    assert counts[0] > counts[1]


def test_conversations_and_texts_may_be_mixed_and_each_ends_as_alone(ort_bundle, target, tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    rows = [{"messages": messages}, {"prompt": "hello"}, {"prompt": messages, "completion": []}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    run_ok(*batch(ort_bundle, source, target))
    model = gemma3_export.load(ort_bundle)
    chat, text = (
        model.generate(prompt, max_new_tokens=NEW_TOKENS, allow_control_tokens=False)
        for prompt in (messages, "hello")
    )
    found = read_rows(target)
    for row, alone in zip(found, (chat, text, chat), strict=True):
        assert row["prompt_tokens"] == alone.prompt_tokens
        assert row["token_ids"] == list(alone.token_ids)


def test_a_conversation_ends_where_its_template_ends_an_answer(
    ort_bundle, target, tmp_path, monkeypatch
):
    messages = [{"role": "user", "content": "hi"}]
    source = write_rows(tmp_path / "in.jsonl", [{"messages": messages}, {"text": "hi"}])
    run_ok(*batch(ort_bundle, source, target))
    chat, text = (row["token_ids"] for row in read_rows(target))
    end = next(token for token in chat if token not in text)
    monkeypatch.setattr(ChatFormat, "end_token_ids", property(lambda self: (end,)))
    run_ok(*batch(ort_bundle, source, target, "--force"))
    ended, same = read_rows(target)
    assert ended["token_ids"] == chat[: chat.index(end) + 1]
    assert ended["stop_reason"] == end
    assert same["token_ids"] == text
    assert gemma3_export.load(ort_bundle).generate(messages).stop_reason == end


def test_chat_makes_texts_user_messages_and_tools_are_read_from_rows(target, tmp_path):
    bundle = chat_bundle("functiongemma")
    tool = {"type": "function", "function": {"name": "now", "description": "T."}}
    tool["function"]["parameters"] = {"type": "object", "properties": {}}
    rows = [{"prompt": "hi", "tools": [tool]}, {"prompt": "hi"}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    run_ok(*batch(bundle, source, target, "--chat"))
    with_tools, without = read_rows(target)
    assert with_tools["prompt_tokens"] > without["prompt_tokens"]
    assert "function_calls" in with_tools
    assert "function_calls" not in without
    assert "plain text; write the prompt as a list of messages, or pass --chat" in error_line(
        *batch(bundle, source, target, "--force")
    )


BROKEN_ROWS = [
    ("{", "is not valid JSON"),
    ("[1]", "is a JSON list"),
    ({"prompt": "   "}, "prompt is empty"),
    ({"prompt": 7}, "prompt is 7; it must be a string"),
    ({"promt": "x"}, "has neither messages, prompt nor text, only promt"),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "choose one with --column"),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": [{"role": "cook", "content": "x"}]}, "cook"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "ends with an answer",
    ),
    ({"text": "long " * 400}, "more than the model's context of 256"),
    ({"text": "\ud800"}, "half of a surrogate pair"),
    ({"text": "a", "images": ["b"]}, "has images"),
    ({"text": "a", "id": [float("inf")]}, "id cannot be written"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN_ROWS, ids=[m for _, m in BROKEN_ROWS])
def test_a_broken_row_stops_the_run_before_it_generates(
    ort_bundle, target, tmp_path, row, message, monkeypatch
):
    source = write_rows(tmp_path / "in.jsonl", [{"text": "fine"}, row])
    monkeypatch.setattr(gemma3_export.Model, "prepare", None)  # would fail
    line = error_line(*batch(ort_bundle, source, target))
    assert message in line
    assert f"{source}:2" in line
    assert not target.exists()
    assert not results_file(target).parent.exists()


def test_broken_rows_are_recorded_in_their_places(ort_bundle, target, tmp_path):
    rows = [{"text": "one"}, *(row for row, _ in BROKEN_ROWS), {"text": "two"}]
    rows[8] = {**rows[8], "id": 77}
    source = write_rows(tmp_path / "in.jsonl", rows)
    result = run_ok(*batch(ort_bundle, source, target, "--on-error", "record"))
    found = read_rows(target)
    assert [row["index"] for row in found] == list(range(len(rows)))
    assert found[0]["token_ids"]
    assert found[-1]["token_ids"]
    for row, (_, message) in zip(found[1:-1], BROKEN_ROWS, strict=True):
        assert message in row["error"]
        assert "token_ids" not in row
    assert found[8]["id"] == 77
    assert f"{len(BROKEN_ROWS)} recorded as errors" in result.stderr


KILLED = """
import os, signal, sys
from gemma3_export.api.batch_results import UnfinishedResults
from gemma3_export.cli import main
add, count = UnfinishedResults.add, 0
def counted(self, index, result):
    global count
    add(self, index, result)
    count += 1
    if count == {rows}:
        if {number} == signal.SIGKILL:
            with self.path.open("ab") as file:  # in the middle of the next line
                file.write(b'{{"index": 0, "tex')
        os.kill(os.getpid(), {number})
UnfinishedResults.add = counted
sys.argv[1:] = {arguments!r}
main()
"""


def interrupted(number: int, rows: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that receives a signal once ``rows`` rows are finished."""
    code = KILLED.format(number=int(number), rows=rows, arguments=[str(a) for a in arguments])
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that interrupts a command in this process after ``rows`` rows."""

    def run_until(rows: int, *arguments: object) -> None:
        add, finished = UnfinishedResults.add, []

        def add_and_stop(self, index, result):
            add(self, index, result)
            finished.append(index)
            if len(finished) == rows:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(UnfinishedResults, "add", add_and_stop)
            assert run(*arguments).exit_code == 130

    return run_until


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_continues_without_losing_or_repeating_a_row(
    ort_bundle, source, target, tmp_path, number, monkeypatch
):
    arguments = batch(ort_bundle, source, target, "--batch-size", 2, "--temperature", 1)
    done = interrupted(number, 3, *arguments)
    assert done.returncode == (-number if number == signal.SIGKILL else 128 + number), done.stderr
    assert not target.exists()
    assert len(results_file(target).read_bytes().splitlines()) >= 4
    kept = [json.loads(line) for line in results_file(target).read_bytes().splitlines()[1:4]]
    started = []
    prepare = gemma3_export.Model.prepare

    def spy(self, prompt, *others, **options):
        started.append(prompt)
        return prepare(self, prompt, *others, **options)

    monkeypatch.setattr(gemma3_export.Model, "prepare", spy)
    result = run_ok(*arguments)
    assert len(started) == len(TEXTS) - 3
    assert "3 from an earlier run" in result.stderr
    found = read_rows(target)
    assert [row["index"] for row in found] == list(range(len(TEXTS)))
    for row in kept:
        assert found[row["index"]] == row
    # The seed that the first run drew is kept, so the result is that of one run.
    header_seed = next(s for s in [row["seed"] for row in kept])
    assert header_seed in {row["seed"] for row in found}
    whole = tmp_path / "whole.jsonl"
    monkeypatch.setattr(batch_module, "row_seed", lambda seed, index: found[index]["seed"])
    run_ok(*batch(ort_bundle, source, whole, "--batch-size", 2, "--temperature", 1))
    assert read_rows(whole) == found
    assert list(target.parent.iterdir()) == [target]


def test_an_unfinished_run_is_continued_only_by_the_same_input_options_and_bundle(
    ort_bundle, portable_bundle, source, target, tmp_path, interrupt
):
    arguments = batch(ort_bundle, source, target, "--batch-size", 2)
    interrupt(3, *arguments)
    kept = results_file(target).read_bytes()
    line = error_line(*arguments, "--top-k", 5)
    assert "top_k was None and is 5" in line
    assert "--restart" in line
    line = error_line(*batch(portable_bundle, source, target))
    assert "another bundle" in line
    other = write_rows(tmp_path / "other.jsonl", [{"text": "x"}] * len(TEXTS))
    assert "another input" in error_line(*batch(ort_bundle, other, target))
    assert results_file(target).read_bytes() == kept
    result = run_ok(*arguments, "--top-k", 1, "--restart", "--batch-size", 7)
    assert "earlier" not in result.stderr
    assert len(read_rows(target)) == len(TEXTS)


def test_another_seed_does_not_continue_a_run(ort_bundle, source, target, interrupt):
    arguments = batch(ort_bundle, source, target, "--temperature", 1)
    interrupt(2, *arguments, "--seed", 4)
    assert "seed was 4 and is 5" in error_line(*arguments, "--seed", 5)
    run_ok(*arguments)  # takes the seed of the earlier run
    assert read_rows(target)[2]["seed"] == row_seed(4, 2)


@pytest.mark.parametrize(
    "damage",
    [
        b'{"index": 99}\n',
        b'{"index": true}\n',
        b"\x00\x00\n",
        b"[]\n",
    ],
)
def test_damaged_results_are_not_continued(ort_bundle, source, target, damage, interrupt):
    arguments = batch(ort_bundle, source, target)
    interrupt(2, *arguments)
    with results_file(target).open("ab") as file:
        file.write(damage)
    assert "is damaged; pass --restart" in error_line(*arguments)
    run_ok(*arguments, "--restart")
    assert len(read_rows(target)) == len(TEXTS)


def test_an_existing_output_is_replaced_only_with_force(ort_bundle, source, target):
    target.parent.mkdir()
    target.write_text("mine", encoding="utf-8")
    assert "exists; pass --force" in error_line(*batch(ort_bundle, source, target))
    assert target.read_text(encoding="utf-8") == "mine"
    run_ok(*batch(ort_bundle, source, target, "--force"))
    assert len(read_rows(target)) == len(TEXTS)
    assert "is the input" in error_line(*batch(ort_bundle, source, source, "--force"))
    folder = target.parent / "folder"
    folder.mkdir()
    assert "not a regular file" in error_line(*batch(ort_bundle, source, folder, "--force"))


def test_an_input_without_rows_is_an_error(ort_bundle, tmp_path, target):
    source = write_rows(tmp_path / "in.jsonl", [""])
    assert "has no rows" in error_line(*batch(ort_bundle, source, target))


def test_an_input_that_changes_while_it_is_read_is_noticed(ort_bundle, source, target, monkeypatch):
    prepare = gemma3_export.Model.prepare

    def change(self, *arguments, **options):
        data = source.read_bytes()
        source.write_bytes(data.replace(b"sea", b"fog"))
        return prepare(self, *arguments, **options)

    monkeypatch.setattr(gemma3_export.Model, "prepare", change)
    line = error_line(*batch(ort_bundle, source, target, "--batch-size", 2))
    assert "was changed while it was being read" in line


def test_options_of_a_batch_are_checked(ort_bundle, source, target):
    for options in ({"batch_size": 0}, {"on_error": "skip"}, {"system": "x"}, {"force": 1}):
        with pytest.raises(gemma3_export.InputError):
            gemma3_export.BatchOptions(**options)
    assert run(*batch(ort_bundle, source, target, "--system", "x")).exit_code == 2


def test_logprobs_and_options_of_numpy_are_written(ort_bundle, source, target):
    summary = gemma3_export.run_batch(
        gemma3_export.load(ort_bundle),
        source,
        target,
        gemma3_export.GenerateOptions(max_new_tokens=2, logprobs=np.int64(2), stop={"zz", "yy"}),
    )
    assert (summary.rows, summary.earlier, summary.failed) == (len(TEXTS), 0, 0)
    assert summary.new_tokens == sum(len(row["logprobs"]) for row in read_rows(target))


def test_rows_that_share_a_prefix_compute_it_once(ort_bundle, tmp_path, target, monkeypatch):
    start = "the sea is blue and the sky is blue and the sun is far and the moon is near "
    source = write_rows(tmp_path / "in.jsonl", [{"text": f"{start}{word}"} for word in TEXTS[:4]])
    reused = []
    result = batch_module.result_to_json

    def spy(completion, tokenizer):
        reused.append(completion.reused_tokens)
        return result(completion, tokenizer)

    monkeypatch.setattr(batch_module, "result_to_json", spy)
    run_ok(*batch(ort_bundle, source, target, "--batch-size", 2))
    assert sum(count >= 16 for count in reused) == 3, "all but the first"
