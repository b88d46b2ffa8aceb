"""The parity report as JSON, JUnit XML, HTML and text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from gemma3_export.bundle.inspection import parity_line
from gemma3_export.errors import InputError
from gemma3_export.parity import (
    GroundTruth,
    ParityReport,
    render_html,
    render_junit,
    render_terminal,
    verify,
)
from gemma3_export.parity.report.plot import render_plot
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def failing(source: WeightSource, ground_truth: GroundTruth) -> ParityReport:
    model = load_reference(source)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0] *= 1.001
    return verify(ReferenceRuntime(model), source, ground_truth=ground_truth)


@pytest.fixture(scope="module")
def broken(source: WeightSource, ground_truth: GroundTruth) -> ParityReport:
    model = load_reference(source)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    return verify(ReferenceRuntime(model), source, ground_truth=ground_truth)


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str) -> list[str]:
    """Check the parts of JSON Schema that the published schema uses."""
    if "$ref" in schema:
        return violations(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, at)
    if "const" in schema and value != schema["const"]:
        return [f"{at}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is not one of {schema['enum']}"]
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    fits = [
        isinstance(value, kinds[name]) and (name == "boolean" or not isinstance(value, bool))
        for name in names
    ]
    if names and not any(fits):
        return [f"{at}: {value!r} is not {names}"]
    found = []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [f"{at}: lacks {n}" for n in schema.get("required", []) if n not in value]
        for name, item in value.items():
            rest = schema.get("additionalProperties", True)
            if name in properties:
                found += violations(item, properties[name], root, f"{at}.{name}")
            elif rest is False:
                found.append(f"{at}: {name} is not in the schema")
            elif isinstance(rest, dict):
                found += violations(item, rest, root, f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += violations(item, schema["items"], root, f"{at}[{index}]")
    return found


@pytest.mark.parametrize("which", ["passing", "failing", "broken"])
def test_the_json_follows_the_published_schema(which: str, request: pytest.FixtureRequest) -> None:
    report: ParityReport = request.getfixturevalue(which)
    text = files("gemma3_export.parity.report").joinpath("report.schema.json").read_text("utf-8")
    schema = json.loads(text)
    data = json.loads(report.to_json())
    assert violations(data, schema, schema, "report") == []
    assert data["passed"] is report.passed
    assert violations(data | {"passed": 1, "more": 2}, schema, schema, "report") != []


def test_junit_has_one_case_for_each_metric(passing: ParityReport, failing: ParityReport) -> None:
    root = ET.fromstring(render_junit(passing))
    metrics = [metric for case in passing.cases for metric in case.metrics]
    gates = [metric for gate in passing.gates for metric in gate.metrics]
    assert (
        len(root.findall(".//testcase")) == len(metrics) + len(gates) == int(root.attrib["tests"])
    )
    assert not root.findall(".//failure")
    bad = ET.fromstring(render_junit(failing))
    assert len(bad.findall(".//failure")) == int(bad.attrib["failures"]) > 0
    assert "layer 2, mlp" in str(bad.findall(".//failure")[0].text)


@pytest.mark.parametrize("which", ["passing", "failing", "broken"])
def test_the_page_loads_no_external_resources(which: str, request: pytest.FixtureRequest) -> None:
    page = render_html(request.getfixturevalue(which))
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(|\bsrc=", page)
    assert page.count("<svg") == 4
    assert "nan" not in re.sub(r"<[^>]*>", "", page).lower().split()
    assert not re.search(r'="(nan|inf|-inf)', page)


def test_the_heading_of_the_page_names_bundle_and_weights(passing: ParityReport) -> None:
    report = replace(passing, source={"kind": "gguf", "location": "sea-q4.gguf", "files": {}})
    page = render_html(report, "gemma <one>")
    header = page.partition("<header>")[2].partition("</header>")[0]
    assert "<h1>Parity of gemma &lt;one&gt;</h1>" in header
    assert "weights: gguf sea-q4.gguf" in header
    assert "<title>Parity of gemma &lt;one&gt;: " in page


def test_the_page_escapes_text_from_the_bundle(passing: ParityReport) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    page = render_html(
        replace(passing, candidate=passing.candidate | {"device": hostile}, files={hostile: "0"})
    )
    assert "<img" not in page
    assert page.count("&lt;img src=x") >= 3  # title, heading and files


def test_inspect_reads_reports_of_both_versions(passing: ParityReport) -> None:
    current = passing.to_json()
    assert json.loads(current)["schema_version"] == 2
    old = json.loads(current.replace("noise_floor", "floor")) | {"schema_version": 1}
    line = parity_line(json.loads(current))
    assert f"worst error {passing.worst_ratio:.2f} x the noise floor of float32" in line
    assert parity_line(old) == line


def test_the_terminal_report_names_the_failure_and_its_place(
    passing: ParityReport, failing: ParityReport, broken: ParityReport
) -> None:
    assert render_terminal(passing).strip().splitlines()[-1].startswith("PASS  15 cases")
    text = render_terminal(failing)
    assert "first divergence: layer 2, mlp" in text
    assert text.strip().splitlines()[-1].startswith("FAIL  prefill-5")
    assert "not_finite" in render_terminal(broken)


def test_the_last_line_says_which_numbers_failed_where_all_cases_pass(
    passing: ParityReport,
) -> None:
    implementation, quality = passing.gates[:2]
    kld, top1, _ = quality.metrics
    bad = (
        replace(kld, value=0.25, passed=False),
        replace(top1, value=0.5, passed=False),
    )
    report = replace(passing, gates=(implementation, replace(quality, passed=False, metrics=bad)))
    last = render_terminal(report).strip().splitlines()[-1]
    assert last.startswith(
        "FAIL  quality: mean_kld is 0.25 (limit 0.01) and top1_agreement is 0.5 (at least 0.93) "
        "(all 15 cases pass), "
    )


def test_the_published_form_reads_back(passing: ParityReport) -> None:
    data = json.loads(passing.to_json())
    assert json.loads(ParityReport.from_json(data).to_json()) == data
    with pytest.raises(InputError, match=r"positions is \"many\".*verify the bundle again"):
        ParityReport.from_json(data | {"cases": [data["cases"][0] | {"positions": "many"}]})


def test_the_plot_of_a_card_has_a_panel_for_each_report(passing: ParityReport) -> None:
    data = json.loads(passing.to_json())
    other = data | {"candidate": data["candidate"] | {"dtype": "int8 <b>"}}
    old = json.loads(passing.to_json().replace("noise_floor", "floor")) | {"schema_version": 1}
    plot = render_plot({"onnx/model.onnx": data, "onnx/model_quantized.onnx": other, "old": old})
    assert plot is not None
    root = ET.fromstring(plot)
    titles = [e.text for e in root.iter() if e.get("class") == "title"]
    assert titles == [
        "reference float32 on cpu: logit error by position",
        "reference int8 <b> on cpu: logit error by position",
    ]
    points = {point.position for case in passing.cases for point in case.points}
    assert len([e for e in root.iter() if e.get("class") == "key"]) >= len(points) // 2
    assert not re.search(r"<script|<image|@import|url\(|href", plot)
    assert render_plot({"old": old}) is None
