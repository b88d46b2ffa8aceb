"""Facts about a loaded runtime, and what parity derives from them."""

from __future__ import annotations

import torch

from gemma3_export.device import CudaOptions, Device
from gemma3_export.parity.options import HalfPrecision, noise_floor_dtype
from gemma3_export.runtimes.protocol import RuntimeInfo

ONNX_INT8 = RuntimeInfo(
    name="onnx",
    versions={"onnxruntime": "1.31"},
    target="ort",
    cache="windowed",
    has_screened_head=True,
    shares_weights=True,
    dtype="int8",
    compute_dtype="bfloat16",
    residual_dtype="float32",
    activation_dtype="bfloat16",
    is_quantized=True,
    computed_in="bfloat16",
    device=Device("cuda", 1),
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    cuda=CudaOptions(graph=True),
)
TORCH = RuntimeInfo(
    name="reference", dtype="float16", compute_dtype="float16", device=Device("cpu"), threads=2
)


def test_reports_print_every_fact_that_applies() -> None:
    assert ONNX_INT8.to_json() == {
        "runtime": "onnx",
        "onnxruntime": "1.31",
        "target": "ort",
        "cache": "windowed",
        "head": "screened",
        "weights": "shared",
        "dtype": "int8",
        "activations": "bfloat16",
        "residual": "float32",
        "computed_in": "bfloat16",
        "device": "cuda:1",
        "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
        "cuda": {
            "graph": True,
            "tf32": False,
            "memory_limit_bytes": None,
            "grows_exactly": True,
        },
        "threads": None,
    }


def test_reports_leave_out_facts_that_do_not_apply() -> None:
    assert TORCH.to_json() == {
        "runtime": "reference",
        "dtype": "float16",
        "device": "cpu",
        "threads": 2,
    }


def test_half_precision_follows_from_the_facts() -> None:
    quantized, plain = map(HalfPrecision.of_runtime, (ONNX_INT8, TORCH))
    assert quantized == HalfPrecision(
        dtype=torch.bfloat16, holds_residual=False, holds_matrices=False
    )
    assert plain == HalfPrecision(dtype=torch.float16, holds_residual=True)


def test_float64_has_the_noise_floor_of_float32() -> None:
    info = RuntimeInfo(
        name="reference", dtype="float64", compute_dtype="float64", device=Device("cpu")
    )
    assert noise_floor_dtype(info) is torch.float32
    assert HalfPrecision.of_runtime(info) is None
