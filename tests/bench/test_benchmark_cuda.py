"""The parts of a benchmark on a GPU that run without one."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_export.bench import machine as benchmark_device
from gemma3_export.bench.machine import gpu_bandwidths, measure_gpu_bandwidths
from gemma3_export.bench.run import bandwidths_of, same_device
from gemma3_export.bench.transformers_candidate import StaticCandidate, TransformersCandidate
from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError, UnavailableError
from tests.support.exported_bundles import exported_bundle
from tests.support.tiny_models import TINY


def worker(name: str, device: str | None) -> Any:
    facts = {} if device is None else {"device": device}
    return SimpleNamespace(name=name, facts={"describe": facts})


def test_measured_bandwidths_are_positive() -> None:
    found = measure_gpu_bandwidths("cpu", read_bytes=2**22, times=2)
    assert len(found) == 2
    assert min(found) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_unmeasurable_gpu_memory_gives_a_reason_instead_of_an_error() -> None:
    found, missing = bandwidths_of("cuda:0", threads=1)
    assert found == []
    assert missing is not None
    assert re.search(r"cuda:0 cannot be measured.*gemma3-export doctor", missing)


def test_without_torch_the_error_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark_device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip install .gemma3-export\[cuda,export\]"):
        gpu_bandwidths("cuda:0")


def test_the_device_is_the_one_that_the_candidates_report() -> None:
    assert same_device([worker("onnx", "cuda"), worker("genai", "CUDA")]) == "cuda:0"
    assert same_device([worker("onnx", "cuda:1"), worker("fake", None)]) == "cuda:1"


def test_candidates_on_different_devices_are_not_compared() -> None:
    with pytest.raises(InputError, match=r"use different devices.*--device cpu"):
        same_device([worker("onnx", "cuda:0"), worker("llama.cpp", "cpu")])


@pytest.mark.slow
def test_a_static_cache_and_compiled_steps_give_the_same_tokens_as_the_plain_model() -> None:
    bundle = Bundle(exported_bundle("ort"))
    plain, static = (kind(bundle, "cpu", 1) for kind in (TransformersCandidate, StaticCandidate))
    for seed, rows, length in ((0, 2, 20), (1, 2, 20), (2, 1, 5)):
        prompt = np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length))
        np.testing.assert_array_equal(static.run(prompt, 8)[2], plain.run(prompt, 8)[2])
    assert static.describe()["cache"] == "static"
