"""A few fixed cases of the harness; `make test-faults` runs thousands of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness.cases import Result
from tests.faults.harness.generators import KINDS

INPUTS = {
    "safetensors": 40,
    "gguf": 40,
    "pt": 40,
    "config": 40,
    "tokenizer": 30,
    "bundle": 20,
    "request": 20,
    "tokens": 20,
    "run": 16,
}
SCHEDULES = {
    "kill": (0, 1, 2, 5),
    "signal": (0, 2, 4, 12),
    "race": (1, 2),
    "appear": (0, 1, 6, 7),
    "disk": (0, 1, 3, 11),
}


def assert_good(results: list[Result]) -> None:
    broken = [str(result) for result in results if not result.verdict.is_good]
    # Surrogates, which some cases have, would stop pytest-xdist.
    assert not broken, "\n".join(broken).encode(errors="backslashreplace").decode()


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", INPUTS)
def test_hostile_inputs_give_a_right_result_or_one_line_of_error(
    kind: str, every: int, tmp_path: Path
) -> None:
    seeds = range(0, INPUTS[kind], every)
    results = [KINDS[kind](seed, tmp_path / str(seed)) for seed in seeds]
    assert_good(results)
    kinds = {result.verdict.kind for result in results}
    assert {"right", "rejected"} <= kinds, f"the cases are of one kind: {kinds}"


@pytest.mark.parametrize("kind", SCHEDULES)
def test_stops_races_and_full_disks_lose_mix_and_leave_nothing(kind: str, tmp_path: Path) -> None:
    assert_good([KINDS[kind](seed, tmp_path) for seed in SCHEDULES[kind]])
