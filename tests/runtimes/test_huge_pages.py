"""Weights move into huge pages where the system has them, and nothing else changes."""

from __future__ import annotations

import mmap
import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma3_export.runtimes.onnx import huge_pages
from gemma3_export.runtimes.onnx.huge_pages import (
    TUNABLES,
    added_ranges,
    collapse_new_memory,
    huge_page_bytes,
    huge_page_setting,
    private_memory,
    with_huge_pages,
)
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.command_line import REPOSITORY, finish, start
from tests.support.exported_bundles import exported_bundle

SIZE = 8 * 2**20
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's setting, on a machine where those that ask get huge pages."""
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "SETTING", file)
    monkeypatch.setattr(huge_pages, "has_glibc", lambda: True)
    return file


@needs_linux
def test_new_memory_is_moved_and_keeps_its_content() -> None:
    if huge_page_setting() in (None, "never"):
        pytest.skip(f"this kernel's setting of huge pages is {huge_page_setting()}")
    if tuple(map(int, platform.release().split(".")[:2])) < (6, 1):
        pytest.skip(f"Linux {platform.release()} cannot collapse pages; 6.1 can")
    before, known = huge_page_bytes(), private_memory()
    assert before is not None
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        content = os.urandom(4096) * (SIZE // 4096)
        mapped[:] = content
        collapse_new_memory(known)
        after = huge_page_bytes()
        assert after is not None
        assert after - before >= SIZE - 2 * huge_pages.HUGE_PAGE_BYTES
        assert mapped[:] == content


@needs_linux
def test_a_system_that_says_never_is_obeyed(setting: Path) -> None:
    setting.write_text("always madvise [never]")
    before, known = huge_page_bytes(), private_memory()
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        mapped[:] = os.urandom(4096) * (SIZE // 4096)
        collapse_new_memory(known)
        after = huge_page_bytes()
    assert before is not None
    assert after is not None
    assert after < before + SIZE // 2  # other threads may have asked for some


def test_only_what_was_added_counts() -> None:
    before = [(10, 20), (30, 40), (60, 70)]
    now = [(0, 5), (8, 25), (30, 40), (55, 75)]
    assert list(added_ranges(before, now)) == [(0, 5), (8, 10), (20, 25), (55, 60), (70, 75)]


def test_without_proc_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAPS", "ROLLUP", "SETTING"):
        monkeypatch.setattr(huge_pages, name, tmp_path / "absent")
    assert private_memory() == []
    assert huge_page_bytes() is None
    assert huge_page_setting() is None
    assert with_huge_pages({}) is None
    collapse_new_memory([])


def test_a_runtime_in_huge_pages_computes_the_same() -> None:
    prompt = [[2, 5, 9, 11]]
    runtimes = [
        OnnxRuntime(exported_bundle("ort"), device="cpu", huge_pages=given)
        for given in (False, True)
    ]
    logits = [
        runtime.step(np.array(prompt), runtime.new_cache(1, 8), num_logits=0)
        for runtime in runtimes
    ]
    assert (logits[0] == logits[1]).all()


def test_the_c_library_is_asked_where_that_changes_something(
    setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert with_huge_pages({"A": "b"}) == {"A": "b", TUNABLES: "glibc.malloc.hugetlb=1"}
    others = with_huge_pages({TUNABLES: "glibc.malloc.arena_max=2"})
    assert others == {TUNABLES: "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}
    assert with_huge_pages({TUNABLES: "glibc.malloc.hugetlb=0"}) is None
    for text in ("[always] madvise never", "always madvise [never]", "nonsense"):
        setting.write_text(text)
        assert with_huge_pages({}) is None
    setting.write_text("always [madvise] never")
    monkeypatch.setattr(huge_pages, "has_glibc", lambda: False)
    assert with_huge_pages({}) is None


REPLACED = """
import os, sys
def replaced(program, arguments, variables):
    print(variables["GLIBC_TUNABLES"], *arguments[-3:])
    sys.exit(0)
os.execve = replaced
"""


@needs_linux
@pytest.mark.parametrize(
    ("option", "code", "restarts"),
    [
        ("--huge-pages", None, True),
        ("--no-huge-pages", None, False),
        # A program that calls main() is not started again.
        ("--huge-pages", "from gemma3_export.cli import main; main()", False),
    ],
)
def test_a_command_that_decodes_restarts_unless_told_not_to(
    option: str, code: str | None, restarts: bool, tmp_path: Path
) -> None:
    if with_huge_pages({}) is None:
        pytest.skip("this system needs no restart for huge pages")
    (tmp_path / "sitecustomize.py").write_text(REPLACED)
    variables = {key: value for key, value in os.environ.items() if key != TUNABLES}
    variables["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(REPOSITORY)))
    process = start("generate", "nowhere", option, code=code, env=variables)
    stdout, stderr = finish(process)
    if restarts:
        assert stdout.decode() == f"glibc.malloc.hugetlb=1 generate nowhere {option}\n"
    else:
        assert stdout == b""
        assert b"error: " in stderr.lower()
