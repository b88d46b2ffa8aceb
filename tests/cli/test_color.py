"""Colored output: where, when, and that nothing but color is added."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from click import unstyle
from click.testing import CliRunner
from rich.console import Console

from gemma3_export.cli import command_line
from gemma3_export.cli.styles import styled
from gemma3_export.progress import ProgressBars, open_bars

ESCAPE = "\x1b["
GREEN, RED, BOLD = "\x1b[32m", "\x1b[31m", "\x1b[1m"


def output_of(*arguments: object, color: bool, **variables: str | None) -> str:
    """Output of a command whose stdout and stderr are a terminal, if ``color``."""
    environment = {"NO_COLOR": None, "FORCE_COLOR": None, "TERM": "xterm"} | variables
    result = CliRunner().invoke(
        command_line, [str(item) for item in arguments], color=color, env=environment
    )
    return result.output


def test_a_terminal_gets_color_and_everything_else_the_same_text(ort_bundle: Path) -> None:
    colored = output_of("inspect", ort_bundle, color=True)
    plain = output_of("inspect", ort_bundle, color=False)
    assert f"{BOLD}model:" in colored
    assert ESCAPE not in plain
    assert unstyle(colored) == plain


@pytest.mark.parametrize(
    ("variables", "is_terminal", "expected"),
    [
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_the_environment_decides(
    variables: dict[str, str], is_terminal: bool, expected: bool
) -> None:
    output = output_of("verify", "absent", color=is_terminal, **variables)
    assert (ESCAPE in output) == expected
    assert unstyle(output).startswith("error: ")


def test_json_is_never_colored(ort_bundle: Path) -> None:
    assert ESCAPE not in output_of("inspect", ort_bundle, "--json", color=True, FORCE_COLOR="1")


def test_verdicts_and_headings_are_colored_within_an_aligned_table() -> None:
    table = "case    same  verdict\n------  ----  -------\nbatch    1/1  pass\ndecode   0/1  FAIL\n"
    colored = styled(table + "\nquality: pass  (Why?)\nFAIL  decode (1 of 2 cases), 1.0 s\n")
    assert f"{BOLD}case    same  verdict" in colored
    assert colored.count(f"{GREEN}pass") == 2
    assert colored.count(f"{RED}{BOLD}FAIL") == 2
    assert "\n".join(unstyle(colored).splitlines()[:4]) + "\n" == table


def test_words_of_a_sentence_and_of_a_path_stay_plain() -> None:
    for text in ("the two pass each other", "/models/pass/passed", "2 bypasses", "failed: no"):
        assert GREEN not in styled(text)
        assert RED not in styled(text)


def drawn(total: int, done: int, elapsed: float) -> str:
    """The bar of a stage that began ``elapsed`` seconds ago and is ``done``."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    now = [0.0]
    bars = open_bars(is_bytes=False, console=console, clock=lambda: now[0])
    task = bars.task_ids[0]
    for seconds in (0, elapsed / 2, elapsed):
        now[0] = seconds
        bars.update(task, completed=int(done * seconds / elapsed), total=total or None)
    bars.stop()
    now[0] = elapsed + 10  # nothing is reported meanwhile
    with console.capture() as capture:
        console.print(bars.make_tasks_table(bars.tasks))
    return re.sub(r"\s+", " ", unstyle(capture.get()))


def test_the_clock_ticks_while_one_unit_of_work_runs() -> None:
    line = drawn(total=0, done=0, elapsed=60)
    assert "0:01:10 elapsed" in line
    assert "left" not in line


def test_the_time_left_follows_from_the_work_that_is_done() -> None:
    line = drawn(total=400, done=100, elapsed=60)
    assert "25%" in line
    assert re.search(r"0:0[23]:\d\d left", line), line


def test_stages_that_start_with_one_word_share_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    opened: list[bool] = []

    def spy(*, is_bytes: bool) -> object:
        opened.append(is_bytes)
        return open_bars(is_bytes=is_bytes, console=Console(file=io.StringIO()))

    monkeypatch.setattr("gemma3_export.progress.open_bars", spy)
    with ProgressBars() as progress:
        progress("hashing the bundle", 5, 10)
        progress("comparing prefill", 0, 20)
        progress("comparing decode", 10, 20)
        progress("comparing decode, full caches", 0, 8)
    assert opened == [True, False]
