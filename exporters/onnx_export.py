"""Write the model as an ONNX graph with external data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import torch

from gemma3_export.bundle import Graph
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_export import Progress, require_dtype
from gemma3_export.exporters.external_data import write_external_data
from gemma3_export.exporters.onnx_trace import TARGETS, trace_onnx
from gemma3_export.reference.weights import WeightSource
from gemma3_export.signature import DType, Signature

__all__ = ["DTYPES", "OnnxWriter"]

# --dtype: matrices on disk, and the cache's element type
DTYPES: dict[str, tuple[torch.dtype, DType]] = {
    "fp32": (torch.float32, "float32"),
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp16": (torch.float16, "float16"),
}


@dataclass(frozen=True, kw_only=True)
class OnnxWriter:
    """A :class:`gemma3_export.exporters.bundle_export.GraphWriter` for ONNX.

    Args:
        target: ``ort`` for ONNX Runtime's fused kernels, ``portable`` for standard operators.
        dtype: a key of :data:`DTYPES`.

    Raises:
        InputError: unknown target or dtype.
    """

    target: str = "ort"
    runtime: ClassVar[str] = "onnx"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        require_dtype(self.dtype, tuple(DTYPES))
        if self.target not in TARGETS:
            raise InputError(f"unknown target {self.target!r}; choose {' or '.join(TARGETS)}")
        if self.target != "ort" and self.dtype != "fp32":
            raise InputError(
                f"target {self.target} has fp32 only; leave --target out to export in {self.dtype}"
            )

    def size_bytes(self, config: Gemma3Config) -> int:
        """Weights and graph."""
        return config.num_parameters * DTYPES[self.dtype][0].itemsize + 2**22

    def write(
        self, source: WeightSource, folder: Path, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        """Trace without weights, then stream the weights into ``onnx/model.onnx_data``."""
        weights_dtype, cache_dtype = DTYPES[self.dtype]
        signature = Signature.of(source.config, cache_dtype=cache_dtype)
        progress("tracing", 0, 1)
        model, recipes = trace_onnx(source.config, signature, self.target, weights_dtype)
        progress("tracing", 1, 1)

        path = folder / "onnx" / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        data = path.with_name(path.name + "_data")
        total = source.config.num_parameters * weights_dtype.itemsize
        written = 0

        def count(size: int) -> None:
            nonlocal written
            written += size
            progress("writing weights", written, total)

        digest = write_external_data(
            model.graph, recipes, source, data, dtype=weights_dtype, progress=count
        )
        ir.save(model, path)
        graph = Graph(
            runtime=self.runtime,
            path=path.relative_to(folder).as_posix(),
            dtype=self.dtype,
            target=self.target,
            cache_dtype=cache_dtype,
            weights=recipes,
        )
        return graph, {data.relative_to(folder).as_posix(): digest}
