"""Disks that are full at fixed points; `make test-faults` tries thousands of others."""

from __future__ import annotations

from pathlib import Path

from tests.faults.harness.generators import KINDS


def test_a_full_disk_leaves_nothing_partial(tmp_path: Path) -> None:
    results = [KINDS["disk"](seed, tmp_path) for seed in (0, 1, 3, 11)]
    broken = [str(result) for result in results if not result.verdict.is_good]
    assert not broken, "\n".join(broken)
