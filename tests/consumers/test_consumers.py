"""The consumers of ``make consumers``: their table in the docs, and the check itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from gemma3_export.bundle import Bundle
from tests.conftest import REPOSITORY
from tests.consumers.__main__ import BEGIN, END, PAGE, main, table, verdicts
from tests.consumers.consumers import CONSUMERS, WORKERS, Answer
from tests.consumers.jobs import CASES, job_for
from tests.support.command_line import run_ok

OURS = {consumer.name: consumer for consumer in CONSUMERS if not consumer.packages}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_in_the_docs_has_a_row_for_every_consumer() -> None:
    page = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    lines = page.split(BEGIN)[1].split(END)[0].strip().splitlines()
    header, _, *rows = map(cells, lines)
    assert header == ["consumer", "version", *CASES]
    assert [row[0] for row in rows] == [consumer.name for consumer in CONSUMERS]
    for row, consumer in zip(rows, CONSUMERS, strict=True):
        for case, verdict in zip(CASES, row[2:], strict=True):
            assert verdict in ("-", consumer.expected_verdict(case))


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda consumer: consumer.name)
def test_every_consumer_has_its_program_and_exact_versions(consumer) -> None:
    assert (WORKERS / consumer.worker).is_file()
    if consumer.packages[:1] == ("-r",):
        assert (REPOSITORY / consumer.packages[1]).is_file()
    elif not consumer.is_node:
        assert all("==" in package or package == "numpy" for package in consumer.packages)


def test_consumers_of_this_environment_give_our_tokens(ort_bundle: Path, tmp_path: Path) -> None:
    job, expected = job_for(Bundle(ort_bundle))
    for name in ("onnxruntime", "transformers"):
        if name == "transformers":
            pytest.importorskip("transformers")
        answer = OURS[name].answer(tmp_path, job)
        assert answer.problem is None
        found = verdicts(answer, expected)
        assert set(found.values()) == {"same", "-"}
        wrong = {case: [[0, *row[1:]] for row in rows] for case, rows in expected.items()}
        assert "same" not in verdicts(answer, wrong).values()


def test_a_consumer_that_cannot_open_the_bundle_says_why(ort_bundle: Path, tmp_path: Path) -> None:
    job, expected = job_for(Bundle(ort_bundle))
    answer = OURS["onnxruntime"].answer(tmp_path, replace(job, bundle=str(tmp_path / "none")))
    assert answer.problem is not None
    assert "FileNotFoundError" in verdicts(answer, expected)["prompt"]


def test_results_become_a_table() -> None:
    answer = Answer(version="1.0", tokens={"prompt": [[1]], "left": [[2]]})
    found = verdicts(answer, {"prompt": [[1]], "left": [[3]]})
    rows = table([{"name": "some tool", "version": "1.0", "cases": found}]).splitlines()
    assert cells(rows[2]) == ["some tool", "1.0", "same", "-", "different", "-", "-"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.real_weights
def test_every_consumer_gives_our_tokens_for_the_real_270m(real_gguf: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    for command in ("onnx", "torchscript"):
        run_ok(command, "--weights", real_gguf, "-o", bundle, "--no-verify")
    folder = REPOSITORY / ".cache" / "consumers"
    result = CliRunner().invoke(main, ["--bundle", str(bundle), "--folder", str(folder)])
    assert result.exit_code == 0, result.output
