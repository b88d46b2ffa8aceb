"""The report as one self-contained page."""

from __future__ import annotations

from gemma3_export.parity.report import ParityReport

__all__ = ["render_html"]


def render_html(report: ParityReport) -> str:
    """The page."""
    return report.to_json()
