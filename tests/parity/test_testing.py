"""``gemma3_export.testing``: parity in a user's own test suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma3_export.testing import assert_parity

pytest_plugins = ["pytester"]

CONFTEST = 'pytest_plugins = ["gemma3_export.pytest_plugin"]\n'


def test_an_exact_bundle_passes_and_leaves_its_reports(ort_bundle: Path, tmp_path: Path) -> None:
    report = assert_parity(ort_bundle, reports=tmp_path)
    assert report.passed
    assert json.loads((tmp_path / "parity.json").read_text())["passed"] is True
    assert (tmp_path / "parity.xml").read_text().count("<testcase") > 5
    assert (tmp_path / "parity.html").read_text().startswith("<!doctype html>")


def test_a_bundle_with_other_weights_fails_with_the_table(ort_bundle: Path, tmp_path: Path) -> None:
    from tests.support.tiny_models import tiny_config, write_hf_folder

    other = tmp_path / "other"
    write_hf_folder(other, tiny_config(vocab_size=400), seed=99)
    with pytest.raises(AssertionError, match="is not exact"):
        assert_parity(ort_bundle, weights=other)


def test_the_plugin_offers_a_fixture_that_writes_reports(
    ort_bundle: Path, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(f"def test_exact(parity):\n    assert parity({str(ort_bundle)!r}).passed\n")
    result = pytester.runpytest_subprocess("--parity-reports", "reports")
    result.assert_outcomes(passed=1)
    assert (pytester.path / "reports" / "test_exact" / "parity.html").is_file()
