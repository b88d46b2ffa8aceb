"""A fixed few hundred hostile inputs; `make test-faults` runs thousands of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness.generators import KINDS

CASES = {
    "safetensors": 40,
    "gguf": 40,
    "pt": 40,
    "config": 40,
    "tokenizer": 30,
    "bundle": 15,
    "request": 20,
    "tokens": 15,
    "run": 12,
}


@pytest.mark.parametrize("kind", CASES)
def test_hostile_inputs_give_a_right_result_or_one_line_of_error(kind: str, tmp_path: Path) -> None:
    results = [KINDS[kind](seed, tmp_path / str(seed)) for seed in range(CASES[kind])]
    broken = [str(result) for result in results if not result.verdict.is_good]
    assert not broken, "\n".join(broken)
    kinds = {result.verdict.kind for result in results}
    assert {"right", "rejected"} <= kinds, f"the cases are of one kind: {kinds}"
