"""Quantised matrices around half-precision activations: the form for CUDA, proven on the CPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from gemma3_export.backends import open_runtime
from gemma3_export.block_format import BlockFormat
from gemma3_export.bundle import Bundle
from gemma3_export.cli.command_line import command_line
from gemma3_export.errors import InputError, ParityError
from gemma3_export.exporters.block_matrix import quantize
from gemma3_export.exporters.bundle_export import export_bundle
from gemma3_export.exporters.bundle_weights import open_bundle_weights
from gemma3_export.exporters.onnx_export import OnnxWriter
from gemma3_export.parity import ParityReport, VerifyOptions, render_terminal, verify
from gemma3_export.placement import check_placement
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.random_source import RandomSource
from tests.cuda_python import cuda_python
from tests.exported_bundles import scratch
from tests.test_activation_range import LOUD, scaled
from tests.test_quantized_export import GGUF_CONFIG, OPTIONS
from tests.tiny_models import tiny_config, tiny_weights, write_gguf

CONFIG = tiny_config(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ONNX_TYPES = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
UNIT = {name: torch.finfo(dtype).eps / 2 for name, dtype in HALF.items()}


@functools.cache
def bundle_of(activations: str) -> Bundle:
    path = Path(scratch().name) / f"int8 {activations}"
    writer = OnnxWriter(dtype="int8", activations=activations, block_size=16)
    return Bundle(export_bundle(RandomSource(CONFIG, 5), path, writer).path)


@functools.cache
def kept_bundle(activations: str) -> Bundle:
    """Blocks with a minimum (a Q4_1-like form is drawn from any Q8_0 file by its quantiser)."""
    folder = Path(scratch().name)
    weights = folder / f"kept {activations}.gguf"
    write_gguf(weights, GGUF_CONFIG, tiny_weights(GGUF_CONFIG), "Q8_0")
    with open_weights(str(weights)) as source:
        writer = OnnxWriter(dtype="keep", activations=activations)
        return Bundle(export_bundle(source, folder / f"kept {activations}", writer).path)


def report_of(bundle: Bundle) -> ParityReport:
    return verify(
        open_runtime(bundle, "onnx", device="cpu"),
        open_bundle_weights(bundle, "onnx"),
        options=OPTIONS,
        full_source=RandomSource(bundle.config, 5) if bundle.config == CONFIG else None,
    )


@pytest.mark.parametrize("activations", HALF)
@pytest.mark.parametrize("make", [bundle_of, kept_bundle])
def test_parity_holds_in_the_precision_of_the_activations(make, activations: str) -> None:
    report = report_of(make(activations))
    assert report.passed, render_terminal(report)
    name = str(HALF[activations]).removeprefix("torch.")
    assert report.floor_dtype == report.candidate["activations"] == name
    computed = {"bf16": "float32, rounded to bfloat16", "fp16": "float16"}
    assert report.candidate["computed_in"] == computed[activations]
    assert report.ranges is not None
    assert report.ranges.weights == (), "the matrices are codes"
    assert f"with {name} activations" in render_terminal(report)
