"""Every export format that CUDA runs, as tiny bundles, for tests on a GPU and over its stub."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma3_export.exporters.bundle_writer import GraphWriter
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.torch.pt2 import Pt2Writer
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from tests.exporters.test_half_precision import half_bundle
from tests.support.exported_bundles import exported, exported_bundle

__all__ = ["FORMATS", "ONNX_FORMATS", "CudaFormat"]


@dataclass(frozen=True, kw_only=True)
class CudaFormat:
    """An export format that CUDA supports."""

    name: str
    runtime: str
    noise_floor_dtype: str  # rounding in this dtype is the noise floor of the parity check
    bundle: Callable[[], Path]  # shared, so do not change it
    is_fused: bool = False  # uses GroupQueryAttention on an in-place cache

    @property
    def can_capture(self) -> bool:
        """Return whether its decode steps can be captured as a CUDA graph."""
        return self.is_fused or self.runtime == "torchscript"


def fused(name: str, dtype: str, bundle: Callable[[], Path]) -> CudaFormat:
    """Return the format of a graph of the target ``ort``."""
    return CudaFormat(
        name=name, runtime="onnx", noise_floor_dtype=dtype, bundle=bundle, is_fused=True
    )


def torch_format(writer: GraphWriter, dtype: str) -> CudaFormat:
    """Return the format of a torch archive."""
    return CudaFormat(
        name=f"{writer.runtime} {writer.dtype}",
        runtime=writer.runtime,
        noise_floor_dtype=dtype,
        bundle=functools.partial(exported, writer),
    )


def quantized(activations: str) -> Path:
    """Return the shared bundle with 8-bit matrices and half-precision activations."""
    return exported(OnnxWriter(dtype="int8", activations=activations, block_size=16))


ONNX_FORMATS = (
    fused("bf16", "bfloat16", functools.partial(half_bundle, "bf16")),
    fused("fp16", "float16", functools.partial(half_bundle, "fp16")),
    fused("int8, bf16", "bfloat16", functools.partial(quantized, "bf16")),
    fused("int8, fp16", "float16", functools.partial(quantized, "fp16")),
    CudaFormat(
        name="portable fp32",
        runtime="onnx",
        noise_floor_dtype="float32",
        bundle=functools.partial(exported_bundle, "portable"),
    ),
)
FORMATS = (
    *ONNX_FORMATS,
    torch_format(TorchScriptWriter(dtype="fp32"), "float32"),
    torch_format(TorchScriptWriter(dtype="bf16"), "bfloat16"),
    torch_format(TorchScriptWriter(dtype="fp16"), "float16"),
    torch_format(Pt2Writer(dtype="fp32"), "float32"),
    torch_format(Pt2Writer(dtype="bf16"), "bfloat16"),
)
