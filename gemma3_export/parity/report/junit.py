"""Render the report as JUnit XML: one suite per case, one test case per metric."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from gemma3_export.parity.report.model import MetricResult, ParityReport
from gemma3_export.parity.report.terminal import describe_divergence, describe_metric

__all__ = ["render_junit"]


def render_junit(report: ParityReport) -> str:
    """Return XML that continuous-integration servers show as test results."""
    root = ET.Element("testsuites", name="gemma3-export verify")
    suites = [
        (f"{case.name}: {case.title}", f"parity.{case.name}", case.metrics) for case in report.cases
    ]
    suites += [
        (f"gate {gate.name}", f"parity.gate.{gate.name}", gate.metrics)
        for gate in report.gates
        if gate.metrics
    ]
    hint = describe_divergence(report.divergence) if report.divergence is not None else ""
    for title, classname, metrics in suites:
        suite = ET.SubElement(
            root,
            "testsuite",
            _counts(metrics),
            name=title,
            errors="0",
            skipped="0",
            timestamp=report.created.removesuffix("+00:00"),
        )
        for metric in metrics:
            case = ET.SubElement(suite, "testcase", classname=classname, name=metric.name, time="0")
            if not metric.passed:
                text = describe_metric(metric)
                ET.SubElement(case, "failure", message=text, type="parity").text = hint or text
    root.attrib |= _counts([metric for _, _, metrics in suites for metric in metrics])
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(metrics: Sequence[MetricResult]) -> dict[str, str]:
    failures = sum(not metric.passed for metric in metrics)
    return {"tests": str(len(metrics)), "failures": str(failures)}
