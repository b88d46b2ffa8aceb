"""Parity checks of correct and incorrect runtimes, and what may not change between runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_export.errors import InputError
from gemma3_export.parity import (
    GroundTruth,
    ParityReport,
    VerifyOptions,
    compare,
    render_terminal,
    verify,
)
from gemma3_export.parity.differences import compare_logits
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource
from tests.parity.conftest import OPTIONS

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_another_seed_uses_other_tokens(source: WeightSource) -> None:
    runtime = ReferenceRuntime(load_reference(source))
    sequences = [
        GroundTruth.for_runtime(runtime, source, options=replace(OPTIONS, seed=seed))
        .sequences[1]
        .ids
        for seed in (0, 1)
    ]
    assert not np.array_equal(*sequences)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_judged_by_their_own_noise_floor(
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


def test_progress_ends_where_it_said_it_would(
    source: WeightSource,
) -> None:
    seen: list[tuple[str, int, int]] = []
    runtime = ReferenceRuntime(load_reference(source))
    verify(runtime, source, options=OPTIONS, progress=lambda *args: seen.append(args))
    assert seen[0][:2] == ("computing expected values", 0)
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


def test_impossible_options_are_rejected() -> None:
    with pytest.raises(InputError, match="decode_steps is 0"):
        VerifyOptions(decode_steps=0)
    with pytest.raises(InputError, match="factor is"):
        VerifyOptions(factor=0.5)


def test_the_divergence_is_exact_where_probabilities_hardly_move() -> None:
    generator = torch.Generator().manual_seed(0)
    expected_logits = torch.randn(3, 1000, dtype=torch.float64, generator=generator) * 4
    delta = torch.randn(3, 1000, dtype=torch.float64, generator=generator)
    for size in (1e-6, 1e-3, 1.0):
        found = expected_logits + size * delta
        p, q = expected_logits.softmax(-1), found.softmax(-1)
        expected = (p * (p.log() - q.log())).sum(-1)
        actual = compare_logits(expected_logits, found, [1, 2, -1])
        np.testing.assert_allclose(actual.kld, expected, rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose(actual.nll[0], -q[0, 1].log(), rtol=1e-12)
        assert np.isnan(actual.nll[2])
