"""The report as JUnit XML: one suite a case, one test case a metric."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from gemma3_export.parity.report.model import MetricResult, ParityReport
from gemma3_export.parity.report.terminal import divergence_text, metric_text

__all__ = ["render_junit"]


def render_junit(report: ParityReport) -> str:
    """XML that continuous-integration servers show as tests."""
    root = ET.Element("testsuites", name="gemma3-export verify")
    groups = [
        (f"{case.name}: {case.title}", f"parity.{case.name}", case.metrics) for case in report.cases
    ]
    groups += [
        (f"gate {gate.name}", f"parity.gate.{gate.name}", gate.metrics)
        for gate in report.gates
        if gate.metrics
    ]
    hint = divergence_text(report) if report.divergence is not None else ""
    for title, classname, metrics in groups:
        add_suite(root, title, classname, metrics, hint, report.created)
    total = sum(len(metrics) for _, _, metrics in groups)
    bad = sum(not metric.passed for _, _, metrics in groups for metric in metrics)
    root.set("tests", str(total))
    root.set("failures", str(bad))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def add_suite(
    root: ET.Element,
    title: str,
    classname: str,
    metrics: tuple[MetricResult, ...],
    hint: str,
    created: str,
) -> None:
    """One case."""
    bad = [metric for metric in metrics if not metric.passed]
    suite = ET.SubElement(
        root,
        "testsuite",
        name=title,
        tests=str(len(metrics)),
        failures=str(len(bad)),
        errors="0",
        skipped="0",
        timestamp=created.removesuffix("+00:00"),
    )
    for metric in metrics:
        case = ET.SubElement(suite, "testcase", classname=classname, name=metric.name, time="0")
        if not metric.passed:
            failure = ET.SubElement(case, "failure", message=metric_text(metric), type="parity")
            failure.text = hint or metric_text(metric)
