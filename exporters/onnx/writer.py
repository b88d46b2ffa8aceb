"""Write the model as an ONNX graph with external data."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from gemma3_export.bundle import BlockFormat, Graph, Signature, WeightRecipe
from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import (
    ELEMENT_TYPES,
    EXPORT_DTYPES,
    FLOAT_DTYPES,
    DType,
    dtype_choices,
    element_type,
    export_dtype,
    require_max_kld,
    torch_dtype,
)
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_writer import half_precision
from gemma3_export.exporters.onnx.external_data import OnWrite, write_external_data
from gemma3_export.exporters.onnx.quantize_weights import quantize_graph
from gemma3_export.exporters.onnx.screened_head import add_screen, is_screened, screen_bytes
from gemma3_export.exporters.onnx.sliding_window import has_windows, make_windowed
from gemma3_export.exporters.onnx.trace import TARGETS, declare_signature, trace_onnx
from gemma3_export.exporters.quantize.calibration import CalibrationPlan
from gemma3_export.exporters.quantize.gptq_quantizer import GptqQuantizer, check_formats
from gemma3_export.exporters.quantize.mixed_precision import calibrate_mixed
from gemma3_export.exporters.quantize.quantizers import (
    GgufRepacker,
    Quantizer,
    RoundToNearest,
    matrix_names,
)
from gemma3_export.parity.options import HalfPrecision
from gemma3_export.progress import Progress
from gemma3_export.reference.weights import WeightSource
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

__all__ = ["OnnxWriter"]


@dataclass(frozen=True, kw_only=True)
class OnnxWriter:
    """A :class:`gemma3_export.exporters.bundle_writer.GraphWriter` for ONNX.

    Args:
        target: ``ort`` for ONNX Runtime's fused kernels, ``portable`` for standard operators.
        dtype: one of :func:`gemma3_export.dtypes.dtype_choices` for ``onnx``.
        activations: what a quantised graph computes in: ``fp32``, ``bf16`` or ``fp16``.
        block_size: columns of a quantised matrix that share a scale.
        max_kld: how far the export may lie from full precision, mean nats a token; None is what
            ``dtype`` keeps to.
        calibration: the text that 4-bit weights are made with.
        screen: store the head a second time, in 8 bits, so that greedy and top-k decoding reads a
            quarter of it (target ``ort`` in fp32, on the CPU); None is wherever that pays.

    Raises:
        InputError: unknown target or dtype, two that do not go together, or an impossible budget.
    """

    target: str = "ort"
    runtime: ClassVar[str] = "onnx"
    dtype: str = "fp32"
    activations: str = "fp32"
    block_size: int = 32
    max_kld: float | None = None
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    screen: bool | None = None

    def __post_init__(self) -> None:
        export_dtype(self.dtype, self.runtime)
        require_max_kld(self.budget)
        if self.target not in TARGETS:
            raise InputError(f"unknown target {self.target!r}; choose {' or '.join(TARGETS)}")
        if self.target != "ort" and self.dtype != "fp32":
            raise InputError(
                f"target {self.target} has fp32 only; leave --target out to export in {self.dtype}"
            )
        if self.activations not in FLOAT_DTYPES:
            raise InputError(
                f"activations {self.activations!r} are not supported; choose "
                f"{', '.join(FLOAT_DTYPES)}"
            )
        if self.activations != "fp32" and not self.is_quantized:
            quantized = (n for n in dtype_choices(self.runtime) if EXPORT_DTYPES[n].is_quantized)
            raise InputError(
                f"--activations {self.activations} goes with --dtype {', '.join(quantized)}, and "
                f"not with {self.dtype}; for all of it in one type: --dtype {self.activations}"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether matrices are stored in blocks."""
        return EXPORT_DTYPES[self.dtype].is_quantized

    @property
    def element(self) -> DType:
        """Element type of the cache, of activations and of weights that are not quantised."""
        return element_type(self.activations if self.is_quantized else self.dtype).name

    @property
    def half(self) -> HalfPrecision | None:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        half = half_precision(torch_dtype(self.element), holds_residual=False)
        return replace(half, holds_matrices=False) if half and self.is_quantized else half

    @property
    def budget(self) -> float:
        """The divergence that the export is allowed, mean nats a token."""
        return EXPORT_DTYPES[self.dtype].max_kld if self.max_kld is None else self.max_kld

    def size_bytes(self, config: Gemma3Config) -> int:
        """Weights and graph; blocks take 0.5 to 1.5 bytes a weight."""
        itemsize = 1.25 if self.is_quantized else ELEMENT_TYPES[self.element].size_bytes
        screened = (
            self.dtype == "fp32" and self.target == "ort" and is_screened(config, self.screen)
        )
        screen = screen_bytes(config) if screened else 0
        return int(config.num_parameters * itemsize) + screen + 2**22

    def write(
        self, source: WeightSource, folder: Path, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        """Trace without weights, then stream the weights into ``onnx/model.onnx_data``."""
        with tempfile.TemporaryDirectory(prefix="calibrated-", dir=folder) as scratch:
            quantizer = self._quantizer(source, folder, Path(scratch), progress)
            return self._write(source, folder, quantizer, progress)

    def _write(
        self, source: WeightSource, folder: Path, quantizer: Quantizer | None, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        signature = Signature.of(source.config, cache_dtype=self.element)
        progress("tracing", 0, 1)
        model, recipes = trace_onnx(
            source.config, signature, self.target, torch_dtype(self.element)
        )
        if quantizer is not None:
            recipes = quantize_weights(model.graph, recipes, quantizer, source.config, self.element)
        progress("tracing", 1, 1)

        path = folder / "onnx" / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        data = path.with_name(path.name + "_data")
        screens = self._screens(source.config, recipes)
        total = stored_bytes(recipes, source.config, self.element)
        total += screen_bytes(source.config) if screens else 0
        written = 0

        def count(size: int) -> None:
            nonlocal written
            written += size
            progress("writing weights", written, total)

        digest = write_external_data(
            model.graph,
            recipes,
            source,
            data,
            dtype=self.element,
            quantizer=quantizer,
            on_write=count,
        )
        ir.save(model, path)
        hashes = {data: digest}
        windowed: Path | None = None
        if self.target == "ort" and has_windows(source.config):
            windowed = path.with_name("model_windowed.onnx")
            hashes |= self._write_windowed(model, source.config, windowed, screens, count)
        graph = Graph(
            runtime=self.runtime,
            path=path.relative_to(folder).as_posix(),
            dtype=self.dtype,
            target=self.target,
            cache_dtype=self.element,
            weights=recipes,
            windowed_path=windowed.relative_to(folder).as_posix() if windowed else None,
            is_screened=screens,
            max_kld=self.budget,
            calibration=quantizer.calibration if quantizer else None,
        )
        return graph, {file.relative_to(folder).as_posix(): sha for file, sha in hashes.items()}

    def _write_windowed(
        self,
        model: ir.Model,
        config: Gemma3Config,
        path: Path,
        screens: bool,
        on_write: OnWrite,
    ) -> dict[Path, str]:
        """Turn ``model`` into its sibling and write that; hashes of weights of its own."""
        hashes: dict[Path, str] = {}
        make_windowed(model.graph, config)
        if screens:
            screen = path.with_name(path.name + "_data")
            hashes[screen] = add_screen(model.graph, config, screen, on_write)
        signature = Signature.of(
            config, cache_dtype=self.element, is_windowed=True, is_screened=screens
        )
        declare_signature(model.graph, signature)
        ir.save(model, path)
        return hashes

    def _screens(self, config: Gemma3Config, recipes: dict[str, WeightRecipe]) -> bool:
        """Whether to screen the head, which stands in the graph with windowed caches.

        Raises:
            InputError: it is wanted and not to be had.
        """
        is_float = recipes[config.head_name].blocks is None and self.element == "float32"
        if self.target == "ort" and is_float and has_windows(config):
            return is_screened(config, self.screen)
        if self.screen:
            raise InputError(
                f"--screen is for a head in float32 and sliding layers, with --target ort; this is "
                f"--dtype {self.dtype} --target {self.target}, and layers are "
                f"{', '.join(sorted(set(config.layer_types)))}; leave --screen out"
            )
        return False

    def _quantizer(
        self, source: WeightSource, folder: Path, scratch: Path, progress: Progress
    ) -> Quantizer | None:
        if self.dtype == "keep":
            return GgufRepacker(source=source)
        if self.dtype == "int8":
            block_format = self._format(bits=8)
            formats = dict.fromkeys(matrix_names(source.config), block_format)
            return RoundToNearest(source=source, formats=formats)
        if EXPORT_DTYPES[self.dtype].is_calibrated:
            formats = dict.fromkeys(matrix_names(source.config), self._format(bits=4))
            check_formats(source.config, formats)
            text = self.calibration.load(source, tokenizer_in(folder), progress)
            if self.dtype == "int4":
                return GptqQuantizer(source, text, scratch, progress).quantize(formats)
            return calibrate_mixed(source, text, self.block_size, self.budget, scratch, progress)
        return None

    def _format(self, bits: int) -> BlockFormat:
        return BlockFormat(bits=bits, block_size=self.block_size, scale_type=self.element)


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer that was saved into a bundle, if any."""
    path = folder / "tokenizer.json"
    return load_tokenizer(path) if path.is_file() else None


def quantize_weights(
    graph: ir.Graph,
    recipes: dict[str, WeightRecipe],
    quantizer: Quantizer,
    config: Gemma3Config,
    scale_type: DType,
) -> dict[str, WeightRecipe]:
    """Let ``graph`` use the formats that ``quantizer`` chooses; return the new recipes.

    Scales get the type of the graph's activations, whatever the quantizer made them in.
    """
    canonical = dict(config.weight_shapes())
    formats: dict[str, BlockFormat] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, recipe in recipes.items():
        if len(canonical[recipe.names[0]]) == 2:
            chosen = quantizer.format(recipe.names)
            if chosen is not None:
                formats[name] = replace(chosen, scale_type=scale_type)
                rows = sum(canonical[part][0] for part in recipe.names)
                shapes[name] = (rows, canonical[recipe.names[0]][1])
    return quantize_graph(graph, recipes, formats, shapes)


def stored_bytes(recipes: dict[str, WeightRecipe], config: Gemma3Config, dtype: DType) -> int:
    """Bytes of all stored tensors."""
    canonical = dict(config.weight_shapes())
    total = 0
    for recipe in recipes.values():
        shapes = [canonical[name] for name in recipe.names]
        if recipe.blocks is None:
            itemsize = (
                4 if len(shapes[0]) == 1 else ELEMENT_TYPES[dtype].size_bytes
            )  # norms stay float32
            total += sum(math.prod(shape) for shape in shapes) * itemsize
        else:
            total += recipe.blocks.size_bytes(sum(shape[0] for shape in shapes), shapes[0][1])
    return total
