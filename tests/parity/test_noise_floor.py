"""The noise floor holds two samples of rounding in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma3_export.parity import GroundTruth
from gemma3_export.parity import ground_truth as module
from gemma3_export.parity.reference_pair import with_other_rounding
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource
from tests.parity.conftest import OPTIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_roundings_differ_by_half_a_unit_at_most(dtype: torch.dtype) -> None:
    states = torch.randn(3, 400, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = with_other_rounding(states, 0)
    assert found.dtype == dtype
    relative = ((found.double() - states.double()) / states.double()).abs()
    assert 0 < relative.max() <= torch.finfo(dtype).eps
    assert torch.equal(found, with_other_rounding(states, 0))
    assert not torch.equal(found, with_other_rounding(states, 1))


def floors(source: WeightSource, dtype: torch.dtype) -> list[np.ndarray]:
    """Return the largest errors of keys, values and logits along the first sequence."""
    runtime = ReferenceRuntime(load_reference(source, dtype))
    truth = GroundTruth.for_runtime(runtime, source, options=OPTIONS)
    caches = [each.max_abs for pair in truth.noise_floor.caches(0) for each in pair]
    return [*caches, truth.noise_floor.logits(0, np.arange(8)).max_abs]


def test_the_larger_of_two_samples_is_the_noise_floor(
    source: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = floors(source, torch.float32)
    monkeypatch.setattr(module, "larger", lambda one, other: one)
    first = floors(source, torch.float32)
    monkeypatch.setattr(module, "larger", lambda one, other: other)
    second = floors(source, torch.float32)
    for found, one, other in zip(both, first, second, strict=True):
        assert not np.array_equal(one, other)
        np.testing.assert_array_equal(found, np.maximum(one, other))


def test_half_precision_has_one_sample(
    source: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "larger", lambda *_: pytest.fail("a second sample"))
    assert floors(source, torch.bfloat16)
