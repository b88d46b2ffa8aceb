"""Packed weights move into huge pages, and nothing else changes."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma3_export.runtimes import huge_pages, onnx_runtime
from gemma3_export.runtimes.huge_pages import (
    HUGE,
    anonymous_mappings,
    gather_in_background,
    gather_pages,
    pieces,
)
from gemma3_export.runtimes.onnx_runtime import OnnxRuntime
from tests.exported_bundles import exported_bundle

MAPS = f"""\
{0x1000:x}-{0x1000 + HUGE:x} rw-p 00000000 00:00 0
{0x10000000:x}-{0x10000000 + 3 * HUGE:x} rw-p 00000000 00:00 0                          [heap]
{0x20000000:x}-{0x20000000 + HUGE // 2:x} rw-p 00000000 00:00 0
{0x30000000:x}-{0x30000000 + 9 * HUGE:x} r--s 00000000 08:01 77                 /a b/model.onnx_data
{0x40000000:x}-{0x40000000 + 9 * HUGE:x} rw-p 00000000 08:01 78                 /tmp/file
{0x50000000:x}-{0x50000000 + 9 * HUGE:x} r-xp 00000000 00:00 0
{0x60000000:x}-{0x60000000 + 9 * HUGE:x} rw-p 00000000 00:00 0                          [stack]
"""


def test_only_large_writable_memory_without_a_file_counts() -> None:
    assert anonymous_mappings(MAPS) == {
        (0x1000, 0x1000 + HUGE),
        (0x10000000, 0x10000000 + 3 * HUGE),
    }


def test_pieces_are_whole_huge_pages_within_a_mapping() -> None:
    assert list(pieces({(0x1000, 0x1000 + HUGE)})) == []
    start = 7 * HUGE + 4096
    found = list(pieces({(start, start + 40 * HUGE)}))
    assert found[0][0] == 8 * HUGE
    assert found[-1][1] == 47 * HUGE
    assert sum(end - first for first, end in found) == 39 * HUGE
    assert all(end - first <= huge_pages.PIECE for first, end in found)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_memory_holds_stays_as_it_is() -> None:
    before = anonymous_mappings()
    memory = mmap.mmap(-1, 24 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.int64)
    array[:] = np.arange(array.size)
    new = anonymous_mappings() - before
    address = array.ctypes.data
    assert any(start <= address < end for start, end in new)
    assert gather_pages(new) >= 0
    np.testing.assert_array_equal(array, np.arange(array.size))


def test_memory_that_is_gone_or_empty_is_no_error() -> None:
    assert gather_pages({(2**46, 2**46 + 4 * HUGE)}) == 0


def test_a_system_without_maps_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "absent")
    assert anonymous_mappings() == set()


def test_small_weights_are_not_worth_a_thread() -> None:
    assert gather_in_background(set(), huge_pages.WORTHWHILE_BYTES - 1) is None
    thread = gather_in_background(anonymous_mappings(), huge_pages.WORTHWHILE_BYTES)
    assert thread is not None
    assert thread.daemon, "an exit does not wait for it"
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_the_runtime_gathers_what_its_session_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(onnx_runtime, "gather_in_background", lambda *given: seen.append(given))
    runtime = OnnxRuntime(exported_bundle("ort"), device="cpu", threads=1)
    ((before, size),) = seen
    assert isinstance(before, set)
    assert size == runtime.bundle.file("onnx/model.onnx_data").stat().st_size
