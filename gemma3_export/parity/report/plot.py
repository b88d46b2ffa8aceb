"""Draw the parity reports of a bundle as one picture, for its model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma3_export.errors import InputError
from gemma3_export.parity.report import charts
from gemma3_export.parity.report.html import environment
from gemma3_export.parity.report.model import ParityReport
from gemma3_export.parity.report.terminal import describe_runtime

__all__ = ["render_plot"]

TEMPLATE = "plot.svg.jinja"
MARGIN, HEAD = 16, 46  # pixels around a panel, and above its chart for title and legend


def render_plot(reports: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return an SVG of the logit error by position, with one panel per report.

    It needs no scripts, fonts or other files, and follows the colors of the reader's system.

    Args:
        reports: the content of ``parity.json``. Reports that cannot be drawn, such as those of
            earlier versions, are left out.

    Returns:
        The SVG, or None if there is nothing to draw.
    """
    panels = []
    for data in reports.values():
        try:
            report = ParityReport.from_json(data)
        except InputError:
            continue
        panels.append((describe_runtime(report.candidate), charts.position_chart(report)))
    if not panels:
        return None
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title="Logit error by position against the noise floor",
            panels=panels,
            plot=charts,
            margin=MARGIN,
            head=HEAD,
            width=charts.WIDTH + 2 * MARGIN,
            height=charts.HEIGHT + HEAD + 2 * MARGIN,
        )
    )
