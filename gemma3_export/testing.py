"""Assert the parity of a bundle in your own test suite.

    from gemma3_export.testing import assert_parity

    def test_our_bundle_is_exact():
        assert_parity("models/gemma-3-270m")

:mod:`gemma3_export.pytest_plugin` offers the same as a fixture that also writes reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma3_export.staging import write_text_atomically

if TYPE_CHECKING:
    from gemma3_export.parity import ParityReport

__all__ = ["assert_parity"]


def assert_parity(
    bundle: Path | str,
    *,
    runtime: str = "onnx",
    weights: Path | str | None = None,
    against: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    reports: Path | None = None,
) -> ParityReport:
    """Fail unless a bundle computes what the reference computes.

    Args:
        bundle: the bundle's folder.
        runtime: ``onnx`` or ``torchscript``.
        weights: the weights that it should have; None takes those in the bundle.
        against: another bundle, ``transformers`` or a Hugging Face folder, in place of the
            reference.
        device: ``cpu``, ``cuda`` or ``cuda:N``; the default does not depend on the machine.
        seed: of the random token ids.
        reports: a folder that gets ``parity.json``, ``parity.xml`` (JUnit) and ``parity.html``.

    Returns:
        The report, for further assertions.

    Raises:
        AssertionError: parity failed; the message is the report's table.
        Gemma3ExportError: the check could not be done.
    """
    from gemma3_export.api.verification import verify
    from gemma3_export.parity import render_html, render_junit, render_terminal

    report = verify(
        bundle,
        runtime=runtime,
        weights=weights,
        against=against,
        device=device,
        seed=seed,
    )
    if reports is not None:
        write_text_atomically(reports / "parity.json", report.to_json())
        write_text_atomically(reports / "parity.xml", render_junit(report))
        write_text_atomically(reports / "parity.html", render_html(report))
    if not report.passed:
        raise AssertionError(f"{bundle} is not exact:\n{render_terminal(report)}")
    return report
