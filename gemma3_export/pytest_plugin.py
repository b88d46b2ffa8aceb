"""A pytest fixture that asserts the parity of a bundle and keeps its reports.

In a ``conftest.py``::

    pytest_plugins = ["gemma3_export.pytest_plugin"]

In a test::

    def test_our_bundle_is_exact(parity):
        parity("models/gemma-3-270m")

``pytest --parity-reports DIR`` writes ``DIR/<test>/parity.json``, ``.xml`` and ``.html``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma3_export.parity import ParityReport
from gemma3_export.testing import assert_parity

__all__ = ["parity", "pytest_addoption"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--parity-reports``."""
    group = parser.getgroup("gemma3-export")
    group.addoption(
        "--parity-reports", metavar="DIR", help="write the reports of the fixture `parity` there"
    )


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Callable[..., ParityReport]:
    """Return :func:`gemma3_export.testing.assert_parity`, with reports if the option is given."""
    folder = request.config.getoption("--parity-reports")
    reports = None if folder is None else Path(folder) / request.node.name

    def check(bundle: Path | str, **options: Any) -> ParityReport:
        return assert_parity(bundle, **{"reports": reports, **options})

    return check
