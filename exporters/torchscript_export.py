"""Write the model as a TorchScript archive."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from gemma3_export.bundle import Graph, WeightRecipe, sha256_of
from gemma3_export.config import Gemma3Config
from gemma3_export.config_json import config_to_json
from gemma3_export.exporters.bundle_export import Progress, half_precision, require_dtype
from gemma3_export.exporters.packing import weight_recipes
from gemma3_export.exporters.step import DecoderStep, example_inputs
from gemma3_export.exporters.torchscript_debug import drop_source_paths
from gemma3_export.exporters.torchscript_modules import TorchScriptGemma3, install_matrices
from gemma3_export.parity.options import HalfPrecision
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.runtimes.torchscript_support import torchscript
from gemma3_export.signature import DType

__all__ = ["DTYPES", "TorchScriptWriter"]

# --dtype: weights, and the cache's element type
DTYPES: dict[str, tuple[torch.dtype, DType]] = {
    "fp32": (torch.float32, "float32"),
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp16": (torch.float16, "float16"),
}


@dataclass(frozen=True, kw_only=True)
class TorchScriptWriter:
    """A :class:`gemma3_export.exporters.bundle_export.GraphWriter` for TorchScript.

    Args:
        dtype: a key of :data:`DTYPES`.
        prepack: let the archive lay out its matrices for the CPU when it is loaded; False makes an
            archive that torch builds without oneDNN can load too.

    Raises:
        InputError: unknown dtype.
    """

    runtime: ClassVar[str] = "torchscript"
    dtype: str = "fp32"
    prepack: bool = True

    def __post_init__(self) -> None:
        require_dtype(self.dtype, tuple(DTYPES))

    @property
    def half(self) -> HalfPrecision | None:
        """See :class:`gemma3_export.exporters.bundle_export.GraphWriter`."""
        return half_precision(DTYPES[self.dtype][0], holds_residual=True)

    def size_bytes(self, config: Gemma3Config) -> int:
        """Weights and code."""
        return config.num_parameters * DTYPES[self.dtype][0].itemsize + 2**22

    def write(
        self, source: WeightSource, folder: Path, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        """Load the packed weights, trace, and save ``torchscript/model.ts``."""
        dtype, cache_dtype = DTYPES[self.dtype]
        path = folder / "torchscript" / "model.ts"
        path.parent.mkdir(exist_ok=True)
        with torchscript(), torch.inference_mode():
            model, recipes = load_packed(source, dtype, progress)
            install_matrices(model, prepack=self.prepack)
            progress("tracing", 0, 1)
            trace: Any = torch.jit.trace  # untyped
            archive = trace(
                DecoderStep(model).eval(),
                example_inputs(source.config, dtype=dtype),
                check_trace=False,  # parity is checked afterwards, and better
            )
            progress("tracing", 1, 1)
            progress("writing weights", 0, 1)
            # A service that has nothing but the archive learns shapes and stop tokens from it.
            config = json.dumps(config_to_json(source.config), indent=2)
            archive.save(str(path), _extra_files={"config.json": config})
            drop_source_paths(path)
            progress("writing weights", 1, 1)
        graph = Graph(
            runtime=self.runtime,
            path=path.relative_to(folder).as_posix(),
            dtype=self.dtype,
            target="prepacked" if self.prepack else "plain",
            cache_dtype=cache_dtype,
            weights=recipes,
        )
        return graph, {graph.path: sha256_of(path)}


def load_packed(
    source: WeightSource, dtype: torch.dtype, progress: Progress
) -> tuple[TorchScriptGemma3, dict[str, WeightRecipe]]:
    """The stand-in model filled by its recipes, one tensor at a time.

    Raises:
        InputError: a weight holds NaN or infinity.
    """
    with torch.device("meta"):
        model = TorchScriptGemma3(source.config)
    recipes = weight_recipes(model)
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    total = sum(parameter.nbytes for parameter in parameters.values())
    done = 0
    for name, recipe in recipes.items():
        start = 0
        for source_name in recipe.names:
            for chunk in source.chunks(source_name):
                check_finite(source_name, chunk)
                parameters[name][start : start + chunk.shape[0]] = chunk.to(dtype)
                start += chunk.shape[0]
        done += parameters[name].nbytes
        progress("reading weights", done, total)
    return model, recipes
