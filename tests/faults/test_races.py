"""Two processes at one output, and files that appear there meanwhile, in fixed orders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness.generators import KINDS

CASES = {"race": (1, 2), "appear": (0, 1, 6, 7)}


@pytest.mark.parametrize("kind", CASES)
def test_nothing_at_an_output_is_lost_or_mixed(kind: str, tmp_path: Path) -> None:
    results = [KINDS[kind](seed, tmp_path) for seed in CASES[kind]]
    broken = [str(result) for result in results if not result.verdict.is_good]
    assert not broken, "\n".join(broken)
