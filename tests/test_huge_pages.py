"""Processes that decode get huge pages where the system gives them to those who ask."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma3_export import huge_pages
from gemma3_export.huge_pages import HUGE_PAGES, TUNABLES, huge_page_variables


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "SETTING", path)
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    return path


def test_they_are_asked_for_where_the_system_waits_to_be_asked(setting: Path) -> None:
    assert huge_page_variables({}) == {TUNABLES: HUGE_PAGES}
    for text in ("[always] madvise never\n", "always madvise [never]\n"):
        setting.write_text(text)
        assert huge_page_variables({}) == {}
    setting.unlink()
    assert huge_page_variables({}) == {}


def test_what_somebody_has_set_stays(setting: Path) -> None:
    assert huge_page_variables({TUNABLES: "glibc.malloc.check=1"}) == {}


def test_another_c_library_is_left_alone(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("", ""))
    assert huge_page_variables({}) == {}


PROGRAM = """
import json, os, sys
from pathlib import Path
from gemma3_export import huge_pages
huge_pages.SETTING = Path(sys.argv[1])
huge_pages.platform.libc_ver = lambda: ("glibc", "2.36")
print(os.getpid(), flush=True)
huge_pages.restart_with_huge_pages()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], sys.stdin.read()]))
"""


def test_a_program_starts_once_more_with_its_arguments_and_input(setting: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != TUNABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(setting), "--prompt", "a b", "ü"],
        input="piped",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, second, result = done.stdout.splitlines()
    assert first == second, "the same process, started twice"
    assert json.loads(result) == [HUGE_PAGES, ["--prompt", "a b", "ü"], "piped"]


@pytest.mark.parametrize(
    ("arguments", "restarts"),
    [(["generate", "x"], True), (["--debug", "generate", "x"], True), (["inspect", "x"], False)],
)
def test_only_generate_starts_once_more(
    arguments: list[str], restarts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    program = importlib.import_module("gemma3_export.cli.command_line")
    monkeypatch.setattr(program, "restart_with_huge_pages", lambda: seen.append("again"))
    monkeypatch.setattr(program, "command_line", lambda **_: sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["gemma3-export", *arguments])
    with pytest.raises(SystemExit):
        program.main()
    assert bool(seen) is restarts
