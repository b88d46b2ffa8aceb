"""Assert the parity of a bundle in your own test suite.

    from gemma3_export.testing import assert_parity

    def test_our_bundle_is_exact():
        assert_parity("models/gemma-3-270m")

:mod:`gemma3_export.pytest_plugin` offers the same as a fixture that also writes reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma3_export.bundle import Bundle
from gemma3_export.files import to_path
from gemma3_export.staging import check_writable, write_text_atomically

if TYPE_CHECKING:
    from gemma3_export.parity import ParityReport

__all__ = ["assert_parity"]


def assert_parity(
    bundle: Bundle | Path | str,
    *,
    runtime: str = "onnx",
    weights: Path | str | None = None,
    against: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    reports: Path | str | None = None,
) -> ParityReport:
    """Fail unless a bundle computes what the reference computes.

    Args:
        bundle: an opened bundle, or its folder.
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

    files = []
    if reports is not None:
        folder = to_path(reports, "reports")
        files = [folder / f"parity.{suffix}" for suffix in ("json", "xml", "html")]
    for file in files:
        check_writable(file)
    report = verify(
        bundle,
        runtime=runtime,
        weights=weights,
        against=against,
        device=device,
        seed=seed,
    )
    place = bundle.path if isinstance(bundle, Bundle) else bundle
    if files:
        name = Path(place).resolve().name
        texts = (report.to_json(), render_junit(report), render_html(report, name))
        for file, text in zip(files, texts, strict=True):
            write_text_atomically(file, text)
    if not report.passed:
        raise AssertionError(f"{place} is not exact:\n{render_terminal(report)}")
    return report
