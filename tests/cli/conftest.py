"""Fixtures for tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def output(tmp_path) -> Iterator[Path]:
    """Yield the path of an output folder; assert at the end that the command left nothing there."""
    parent = tmp_path / "outputs"
    parent.mkdir()
    yield parent / "out"
    assert list(parent.iterdir()) == []
