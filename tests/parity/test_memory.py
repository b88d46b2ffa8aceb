"""The ground truth is computed in blocks: one layer, one slice of the vocabulary, few positions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.parity import GroundTruth, differences, stored_logits, verify
from gemma3_export.parity.differences import compare_logits
from gemma3_export.parity.reference_pair import ReferencePair
from gemma3_export.parity.stored_logits import StoredLogits
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.parity.conftest import OPTIONS
from tests.support.exported_bundles import exported_bundle, source_of
from tests.support.tiny_models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def truth(source: WeightSource) -> GroundTruth:
    return GroundTruth.for_runtime(
        ReferenceRuntime(load_reference(source)), source, options=OPTIONS
    )


def test_expected_values_are_those_of_a_whole_float64_model(source: WeightSource) -> None:
    found = truth(source)
    model = load_reference(source, torch.float64)
    for index, sequence in enumerate(found.sequences):
        with torch.inference_mode():
            output = model(torch.from_numpy(sequence.ids)[None])
        positions = np.arange(len(sequence.ids))[::3]
        torch.testing.assert_close(
            found.expected.logits(index, positions), output.logits[0, ::3], rtol=1e-12, atol=1e-12
        )
        for ours, whole in zip(
            found.expected.key_values(index), output.past_key_values, strict=True
        ):
            torch.testing.assert_close(ours[0], whole[0][0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(ours[1], whole[1][0], rtol=1e-12, atol=1e-12)


def test_the_first_decode_steps_feed_what_the_runtime_chooses(source: WeightSource) -> None:
    found = truth(source)
    start = 1 if OPTIONS.decode_steps // 2 >= 6 else 6 - OPTIONS.decode_steps // 2
    ids = torch.from_numpy(found.sequences[0].ids)
    with torch.inference_mode():
        logits = load_reference(source)(ids[None]).logits[0]
    chosen = logits[start - 1 : start - 1 + OPTIONS.greedy_steps].argmax(-1)
    assert chosen.tolist() == ids[start : start + OPTIONS.greedy_steps].tolist()


def loaded_layers(model: nn.Module) -> int:
    return sum(
        not any(parameter.is_meta for parameter in layer.parameters())
        for layer in model.model.layers
    )


def test_one_layer_is_in_memory_at_a_time(source: WeightSource) -> None:
    pair = ReferencePair(source, [torch.arange(5)], torch.float32)
    seen = []
    for _ in pair.layers():
        seen.append([loaded_layers(forward.model) for forward in pair.passes])
        for forward in pair.passes:
            forward.step(0)
    assert seen == [[1, 1]] * source.config.num_hidden_layers
    for forward in pair.passes:
        assert loaded_layers(forward.model) == 0
        assert forward.model.model.embed_tokens.weight.is_meta


def test_the_size_of_blocks_does_not_change_the_numbers(
    source: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = ReferenceRuntime(load_reference(source))
    whole = verify(runtime, source, options=OPTIONS)
    monkeypatch.setattr(differences, "BLOCK_ELEMENTS", 1500)  # several blocks of odd sizes
    monkeypatch.setattr(stored_logits, "MEMORY_BYTES", 1000)  # a file
    blocks = verify(runtime, source, options=OPTIONS)
    assert whole.passed
    assert blocks.passed
    for ours, theirs in zip(blocks.cases, whole.cases, strict=True):
        for found, expected in zip(ours.metrics, theirs.metrics, strict=True):
            assert found.name == expected.name
            assert found.value == pytest.approx(expected.value, rel=1e-6, abs=1e-14)


def test_a_comparison_in_blocks_keeps_nan_and_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "BLOCK_ELEMENTS", 12)
    expected = torch.linspace(-3, 3, 100, dtype=torch.float64).repeat(4, 1)
    actual = expected.clone()
    actual[1, 10], actual[2, 70], actual[3, 5] = torch.nan, torch.inf, 5.0
    found = compare_logits(expected, actual, [0, 1, 2, 99])
    assert found.max_abs[0] == 0
    assert np.isinf(found.max_abs[1:3]).all()
    assert np.isinf(found.kld[1:3]).all()
    assert found.is_same_top1.tolist() == [True, False, False, False]
    assert found.margin == pytest.approx(6 / 99)
    exact = (expected[3].softmax(-1) * (expected[3] - actual[3])).sum() + (
        actual[3].logsumexp(0) - expected[3].logsumexp(0)
    )
    assert found.kld[3] == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_damage_outside_the_layers_is_found(name: str) -> None:
    class Damaged(RandomSource):
        def read(self, name_: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            found = super().read(name_, start, stop).clone()
            if name_ == name and start <= 300 < start + len(found):
                found[300 - start] = torch.nan
            return found

    config = replace(tiny_config(vocab_size=400), tie_word_embeddings=False)
    intact = RandomSource(config, 1)
    with pytest.raises(InputError, match=f"weight {name} has .* values that are NaN"):
        verify(ReferenceRuntime(load_reference(intact)), Damaged(config, 1), options=OPTIONS)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Full(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
        def write(self, content: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored_logits.tempfile, "SpooledTemporaryFile", Full)
    return


@pytest.mark.usefixtures("full_disk")
def test_a_full_temporary_folder_is_named() -> None:
    stored = StoredLogits(1000)
    stored.add([(0, 1), (0, 2)])
    with pytest.raises(Gemma3ExportError, match=r"cannot store 0 MB .* set TMPDIR"):
        stored.write([(0, 1)], 0, torch.zeros(1, 1000))


def test_the_runtime_is_released_before_its_variants_are_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[bool] = []
    original = OnnxRuntime.with_other_cache

    def with_other_cache(self: OnnxRuntime) -> OnnxRuntime | None:
        opened.append(self.session is not None)
        return original(self)

    monkeypatch.setattr(OnnxRuntime, "with_other_cache", with_other_cache)
    path, weights = exported_bundle("ort"), source_of()
    runtime = OnnxRuntime(path, device="cpu", threads=1)
    assert verify(runtime, weights, options=OPTIONS).passed
    assert verify(runtime, weights, options=OPTIONS, releases_candidate=True).passed
    assert opened == [True, False]
