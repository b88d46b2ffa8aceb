"""The parity report: its verdict, its forms, and what may not change from run to run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from gemma3_export.bundle.inspection import parity_line
from gemma3_export.errors import InputError
from gemma3_export.parity import (
    GroundTruth,
    ParityReport,
    VerifyOptions,
    compare,
    render_html,
    render_junit,
    render_terminal,
    verify,
)
from gemma3_export.parity.differences import compare_logits
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource, open_weights
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

VOCAB = 400
OPTIONS = VerifyOptions(decode_steps=12, greedy_steps=4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors only lose time to the hand-over between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "tiny"
    write_hf_folder(path, tiny_config(vocab_size=VOCAB))
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> WeightSource:
    return open_weights(str(folder))


@pytest.fixture(scope="module")
def ground_truth(source: WeightSource) -> GroundTruth:
    runtime = ReferenceRuntime(load_reference(source))
    tokenizer = tiny_gemma_tokenizer(VOCAB)
    return GroundTruth.for_runtime(runtime, source, options=OPTIONS, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def passing(source: WeightSource, ground_truth: GroundTruth) -> ParityReport:
    return verify(ReferenceRuntime(load_reference(source)), source, ground_truth=ground_truth)


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
    """A small structural check: what of JSON Schema the published schema uses."""
    if "$ref" in schema:
        return violations(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, at)
    if "const" in schema and value != schema["const"]:
        return [f"{at}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is none of {schema['enum']}"]
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
        return [f"{at}: {value!r} is no {names}"]
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


def test_a_correct_runtime_passes_with_text_prompts(passing: ParityReport) -> None:
    assert passing.passed
    assert passing.divergence is None
    assert sum(case.is_text for case in passing.cases) == 5
    assert {case.name for case in passing.cases} >= {"prefill-5", "prefill-15", "chunked", "decode"}


def test_every_kv_tensor_is_compared(passing: ParityReport) -> None:
    for case in passing.cases:
        if case.name != "kept-logits":
            assert {(layer.layer, layer.kind) for layer in case.layers} == {
                (layer, kind) for layer in range(5) for kind in ("key", "value")
            }


def test_decoding_crosses_the_window(passing: ParityReport) -> None:
    case = next(case for case in passing.cases if case.name == "decode")
    positions = [point.position for point in case.points]
    assert min(positions) < 6 < max(positions)
    assert case.steps == OPTIONS.decode_steps + 1


def test_the_same_check_twice_gives_the_same_numbers(source: WeightSource) -> None:
    reports = [
        verify(ReferenceRuntime(load_reference(source)), source, options=OPTIONS) for _ in range(2)
    ]
    first, second = (replace(report, created="", seconds={}).to_json() for report in reports)
    assert first == second


def test_another_seed_looks_at_other_tokens(source: WeightSource) -> None:
    runtime = ReferenceRuntime(load_reference(source))
    sequences = [
        GroundTruth.for_runtime(runtime, source, options=replace(OPTIONS, seed=seed))
        .sequences[1]
        .ids
        for seed in (0, 1)
    ]
    assert not np.array_equal(*sequences)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_held_to_their_own_floor(
    dtype: torch.dtype, source: WeightSource
) -> None:
    runtime = ReferenceRuntime(load_reference(source, dtype))
    report = verify(runtime, source, options=OPTIONS)
    gates = {gate.name: gate.passed for gate in report.gates}
    assert gates["implementation"], report.to_json()


def test_gate_b_measures_rounded_weights_against_full_precision(source: WeightSource) -> None:
    class Rounded(type(source)):  # type: ignore[misc]
        def read(self, *args: Any) -> torch.Tensor:
            coarse = source.read(*args)
            return (coarse * 8).round() / 8 if coarse.ndim == 2 else coarse

    rounded = Rounded.__new__(Rounded)
    rounded.__dict__ |= source.__dict__
    runtime = ReferenceRuntime(load_reference(rounded))
    report = verify(runtime, rounded, options=OPTIONS, full_source=source)
    gates = {gate.name: gate for gate in report.gates}
    assert gates["implementation"].passed
    assert not gates["quality"].passed
    assert not report.passed


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
def test_the_page_needs_nothing_from_elsewhere(which: str, request: pytest.FixtureRequest) -> None:
    page = render_html(request.getfixturevalue(which))
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(|\bsrc=", page)
    assert page.count("<svg") == 4
    assert "nan" not in re.sub(r"<[^>]*>", "", page).lower().split()
    assert not re.search(r'="(nan|inf|-inf)', page)


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


def test_the_terminal_says_what_is_wrong_and_where(
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


def test_progress_ends_where_it_said_it_would(
    source: WeightSource, ground_truth: GroundTruth
) -> None:
    seen: list[tuple[str, int, int]] = []
    runtime = ReferenceRuntime(load_reference(source))
    verify(runtime, source, ground_truth=ground_truth, progress=lambda *args: seen.append(args))
    assert seen[0] == ("computing expected values", 0, 1)
    assert seen[-1][1] == seen[-1][2]
    assert all(done <= total for _, done, total in seen)


def test_transformers_agrees_with_the_reference(
    folder: Path, source: WeightSource, ground_truth: GroundTruth
) -> None:
    pytest.importorskip("transformers")
    from gemma3_export.parity.transformers_runtime import TransformersRuntime

    runtime = TransformersRuntime(folder)
    report = verify(runtime, source, ground_truth=ground_truth)
    assert report.passed, render_terminal(report)
    reference = ReferenceRuntime(load_reference(source))
    assert compare(reference, runtime, source, ground_truth=ground_truth).passed


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InputError, match="decode_steps is 0"):
        VerifyOptions(decode_steps=0)
    with pytest.raises(InputError, match="factor is"):
        VerifyOptions(factor=0.5)


def test_the_divergence_is_exact_where_probabilities_hardly_move() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 1000, dtype=torch.float64, generator=generator) * 4
    delta = torch.randn(3, 1000, dtype=torch.float64, generator=generator)
    for size in (1e-6, 1e-3, 1.0):
        found = truth + size * delta
        p, q = truth.softmax(-1), found.softmax(-1)
        expected = (p * (p.log() - q.log())).sum(-1)
        actual = compare_logits(truth, found, [1, 2, -1])
        np.testing.assert_allclose(actual.kld, expected, rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose(actual.nll[0], -q[0, 1].log(), rtol=1e-12)
        assert np.isnan(actual.nll[2])
