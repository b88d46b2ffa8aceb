"""ONNX graphs in half precision: which tensors are half, and parity on the CPU."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.parity import VerifyOptions, verify
from gemma3_export.reference.weights.bundle_weights import OnnxWeights
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import Logits
from tests.support.exported_bundles import exported, source_of
from tests.support.tiny_models import TINY

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ONNX_TYPES = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
FLOAT = onnx.TensorProto.FLOAT


def half_bundle(dtype: str) -> Path:
    """Return the shared bundle in ``dtype``."""
    return exported(OnnxWriter(dtype=dtype))


@functools.cache
def runtime(dtype: str) -> OnnxRuntime:
    return OnnxRuntime(half_bundle(dtype), device="cpu", threads=1)


def random_logits(dtype: str) -> Logits:
    ids = np.random.default_rng(3).integers(0, TINY.vocab_size, (1, 9))
    return runtime(dtype).step(ids, runtime(dtype).new_cache(1, 9), num_logits=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_parity_holds_on_the_cpu(dtype: str) -> None:
    options = VerifyOptions(decode_steps=12, greedy_steps=6)
    report = verify(runtime(dtype), source_of(), options=options)
    assert report.passed, report.to_json()
    assert report.noise_floor_dtype == str(TYPES[dtype]).removeprefix("torch.")
    assert (
        report.candidate["computed_in"]
        == {
            "bf16": "float32, rounded to bfloat16",
            "fp16": "fp16",
        }[dtype]
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_matrices_and_cache_are_half_and_norms_are_not(dtype: str) -> None:
    bundle = Bundle(half_bundle(dtype))
    graph = onnx.load(bundle.file(bundle.graph("onnx").path), load_external_data=False).graph
    half = ONNX_TYPES[dtype]
    shapes = dict(TINY.weight_shapes())
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for name, recipe in bundle.graph("onnx").weights.items():
        assert stored[name] == (half if len(shapes[recipe.names[0]]) == 2 else FLOAT), name
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert kinds.pop("logits") == FLOAT
    assert {kind for name, kind in kinds.items() if "." in name} == {half}


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_read_back_from_a_half_bundle_are_the_rounded_ones(dtype: str) -> None:
    source, weights = source_of(), OnnxWeights(Bundle(half_bundle(dtype)))
    for name, shape in TINY.weight_shapes():
        expected = source.read(name).to(TYPES[dtype] if len(shape) == 2 else torch.float32)
        assert torch.equal(weights.read(name), expected), name


def test_the_upcast_graph_rounds_where_the_original_does() -> None:
    bits = random_logits("bf16").view(np.uint32)
    assert not (bits & 0xFFFF).any(), "the head's product gives bfloat16 numbers"
    values = runtime("bf16").new_cache(1, 4)
    runtime("bf16").step(np.array([[2, 5, 9]]), values, num_logits=1)
    for _, value in values.read(0):
        assert not (np.ascontiguousarray(value).view(np.uint32) & 0xFFFF).any()


def test_the_two_half_types_give_different_results() -> None:
    single, half = random_logits("bf16"), random_logits("fp16")
    assert 1e-4 < np.abs(single - half).max() < 0.1


def test_a_bf16_bundle_without_the_onnx_package_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnavailableError, match=r"pip install onnx.*--dtype fp32"):
        OnnxRuntime(half_bundle("bf16"), device="cpu")


@pytest.mark.parametrize("dtype", TYPES)
def test_the_portable_target_rejects_half_precision(dtype: str) -> None:
    with pytest.raises(InputError, match="portable supports fp32 only"):
        OnnxWriter(target="portable", dtype=dtype)
