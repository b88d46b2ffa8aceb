"""Pages of mapped weights are dropped, and nothing that was written is lost."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma3_export.runtimes.onnx import mapped_pages
from gemma3_export.runtimes.onnx.mapped_pages import drop_mapped_pages

SIZE = 256 * mmap.PAGESIZE
pytestmark = pytest.mark.skipif(not mapped_pages.MAPS.exists(), reason="needs Linux's /proc")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx_data"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def mapping(file: Path) -> Iterator[mmap.mmap]:
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped,
    ):
        yield mapped


def resident_bytes(file: Path) -> int:
    """Return the resident size of this process's mappings of ``file``."""
    smaps = mapped_pages.MAPS.read_text()
    blocks = re.findall(rf"{re.escape(str(file.resolve()))}\n(?:.*\n)*?Rss: +(\d+) kB", smaps)
    return 1024 * sum(map(int, blocks))


def test_pages_that_equal_the_file_are_dropped_and_come_back(
    file: Path, mapping: mmap.mmap
) -> None:
    before = mapping[:]
    assert resident_bytes(file) == SIZE
    assert drop_mapped_pages(file) == SIZE
    assert resident_bytes(file) == 0
    assert mapping[:] == before


def test_a_mapping_that_was_written_to_stays(file: Path, mapping: mmap.mmap) -> None:
    mapping[5:9] = b"mine"
    assert drop_mapped_pages(file) == 0
    assert mapping[5:9] == b"mine"


def test_other_files_are_left_alone(file: Path, mapping: mmap.mmap) -> None:
    held = mapping[:]
    assert drop_mapped_pages(file.with_name("model.onnx")) == 0
    assert resident_bytes(file) == len(held)


def test_without_proc_nothing_happens(
    file: Path, mapping: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = mapping[:]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(mapped_pages, "MAPS", file.with_name("absent"))
        assert drop_mapped_pages(file) == 0
    assert resident_bytes(file) == len(held)
