"""The graph writer for ONNX: a variant's graph, its sliding-window sibling and their weights."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from gemma3_export.bundle import (
    FUSED_TARGETS,
    WEB_DTYPES,
    BlockFormat,
    Graph,
    WeightRecipe,
    graph_stem,
    variant_name,
)
from gemma3_export.config import TOKENIZER_NAME, Gemma3Config
from gemma3_export.dtypes import (
    ELEMENT_TYPES,
    EXPORT_DTYPES,
    FLOAT_DTYPES,
    ROUNDINGS,
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
from gemma3_export.exporters.onnx.integer_products import rotated_rows
from gemma3_export.exporters.onnx.minimum_version import DECOMPOSED_OPSET, minimum_onnxruntime
from gemma3_export.exporters.onnx.passes import (
    MODEL_PASSES,
    SLIDING_WINDOW_PASSES,
    GraphPlan,
    apply_passes,
)
from gemma3_export.exporters.onnx.quantize_weights import quantized_recipes, quantized_shapes
from gemma3_export.exporters.onnx.screened_head import screen_bytes, should_screen, write_screen
from gemma3_export.exporters.onnx.sliding_window import has_sliding_layers
from gemma3_export.exporters.onnx.trace import (
    OPSET_VERSION,
    TARGETS,
    has_wide_residual,
    trace_onnx,
)
from gemma3_export.exporters.quantize.calibration import CalibrationOptions
from gemma3_export.exporters.quantize.gptq_quantizer import GptqQuantizer, check_formats
from gemma3_export.exporters.quantize.mixed_precision import quantize_mixed
from gemma3_export.exporters.quantize.q4_0 import (
    COMPARED_PARAMETERS,
    GRID,
    GgufRounding,
    compare_with_gptq,
    reason_for_q4_0,
)
from gemma3_export.exporters.quantize.quantizers import (
    GgufRepacker,
    Quantizer,
    RoundToNearest,
    matrix_names,
)
from gemma3_export.exporters.quantize.smoothing import measure_smoothing
from gemma3_export.files import is_file
from gemma3_export.parity.options import HalfPrecision
from gemma3_export.progress import Progress
from gemma3_export.reference.weights import WeightSource
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

__all__ = ["OnnxWriter"]

# Export dtypes of targets that do not support all of them.
TARGET_DTYPES = {"portable": ("fp32",), "web": tuple(WEB_DTYPES)}
ATTENTION_MULTIPLE = 8  # of a head's size, in GroupQueryAttention


@dataclass(frozen=True, kw_only=True)
class OnnxWriter:
    """A :class:`gemma3_export.exporters.bundle_writer.GraphWriter` for ONNX.

    Args:
        target: ``ort`` for ONNX Runtime's fused kernels, ``portable`` for standard operators,
            ``web`` for what transformers.js and onnxruntime-web run fast.
        dtype: one of :func:`gemma3_export.dtypes.dtype_choices` for ``onnx``.
        activations: compute type of a quantized graph: ``fp32``, ``bf16`` or ``fp16``.
        block_size: columns of a quantized matrix that share a scale; target ``web`` and dtype
            ``w8a8`` have one scale per row.
        max_kld: largest divergence from full precision at which the export passes, in mean nats
            per token; defaults to that of ``dtype``.
        calibration: the text for 4-bit weights.
        rounding: how ``int4`` rounds: ``gptq``, ``q4_0``, or ``auto``, which is ``q4_0`` for
            checkpoints that were trained for it.
        screen: store an 8-bit copy of the head, so that greedy and top-k decoding reads a quarter
            of the bytes (target ``ort`` in fp32, on the CPU); by default, if the head is large.
        opset: 21 makes a ``portable`` graph for runtimes without opset 23, such as ONNX Runtime
            1.18; attention and norms become several nodes.

    Raises:
        InputError: unknown target or dtype, options that exclude each other, or an impossible
            budget.
    """

    target: str = "ort"
    runtime: ClassVar[str] = "onnx"
    dtype: str = "fp32"
    activations: str = "fp32"
    block_size: int = 32
    max_kld: float | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    rounding: str = "auto"
    screen: bool | None = None
    opset: int | None = None

    def __post_init__(self) -> None:
        export_dtype(self.dtype, self.runtime)
        self._check_rounding()
        require_max_kld(self.budget)
        if self.target not in TARGETS:
            raise InputError(f"unknown target {self.target!r}; choose {' or '.join(TARGETS)}")
        supported = TARGET_DTYPES.get(self.target, (self.dtype,))
        if self.dtype not in supported:
            raise InputError(
                f"target {self.target} supports {' and '.join(supported)} only, not "
                f"{self.dtype}; choose another dtype or target"
            )
        if self.activations not in FLOAT_DTYPES:
            raise InputError(
                f"activations {self.activations!r} are not supported; choose "
                f"{', '.join(FLOAT_DTYPES)}"
            )
        if self.opset is not None and (
            self.target != "portable" or self.opset not in (DECOMPOSED_OPSET, OPSET_VERSION)
        ):
            raise InputError(
                f"opset {self.opset} is not supported for target {self.target}; with --target "
                f"portable, choose {DECOMPOSED_OPSET} or {OPSET_VERSION}. (Fused attention needs "
                "ONNX Runtime 1.24 or newer, because the window of older releases is one token "
                "longer.)"
            )
        if self.block_size != OnnxWriter.block_size and self.has_rotated_rows:
            name = "target web" if self.target == "web" else f"dtype {self.dtype}"
            raise InputError(
                f"block_size is {self.block_size}, but {name} has one scale per row; omit "
                "--block-size"
            )
        if self.activations != "fp32" and self.target == "web":
            raise InputError(
                f"target web computes in fp32; omit --activations {self.activations}, or choose "
                "another target"
            )
        if self.activations != "fp32" and not EXPORT_DTYPES[self.dtype].has_half_activations:
            takers = (
                n for n in dtype_choices(self.runtime) if EXPORT_DTYPES[n].has_half_activations
            )
            raise InputError(
                f"--activations {self.activations} requires --dtype {', '.join(takers)}, not "
                f"{self.dtype}; for weights and activations in one type, use "
                f"--dtype {self.activations}"
            )

    def _check_rounding(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise InputError(
                f"rounding {self.rounding!r:.40} is not supported; choose {', '.join(ROUNDINGS)}"
            )
        if self.rounding != "auto" and self.dtype != "int4":
            raise InputError(
                f"--rounding {self.rounding} applies to --dtype int4, not to {self.dtype}; omit it"
            )
        if self.rounding == "q4_0" and self.block_size != GRID.block_size:
            raise InputError(
                f"--rounding q4_0 has blocks of {GRID.block_size}, not of {self.block_size}; omit "
                "--block-size"
            )
        if self.rounding == "q4_0" and self.calibration.file is not None:
            raise InputError(
                "--rounding q4_0 uses no calibration text; omit --calibration, or use "
                "--rounding auto, which measures both ways with it"
            )

    @property
    def is_quantized(self) -> bool:
        """True if matrices are stored as integers."""
        return EXPORT_DTYPES[self.dtype].is_quantized

    @property
    def has_rotated_rows(self) -> bool:
        """True if quantized matrices are rotated, with one scale per row."""
        return self.is_per_channel or (self.is_quantized and self.target == "web")

    @property
    def is_per_channel(self) -> bool:
        """True if each output has one scale, instead of one per block."""
        return EXPORT_DTYPES[self.dtype].is_per_channel

    @property
    def element(self) -> DType:
        """Element type of the cache, of activations and of weights that are not quantized."""
        return element_type(self.activations if self.is_quantized else self.dtype).name

    @property
    def path(self) -> str:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return f"onnx/{graph_stem(self.dtype, self.element)}.onnx"

    @property
    def variant(self) -> str:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return variant_name(self.dtype, self.element)

    @property
    def half(self) -> HalfPrecision | None:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        dtype = torch_dtype(self.element)
        half = half_precision(dtype, holds_residual=not has_wide_residual(dtype))
        return replace(half, holds_matrices=False) if half and self.is_quantized else half

    @property
    def budget(self) -> float:
        """Largest divergence at which the export passes, in mean nats per token."""
        return EXPORT_DTYPES[self.dtype].max_kld if self.max_kld is None else self.max_kld

    def size_bytes(self, config: Gemma3Config) -> int:
        """Return about how much space the files need; blocks take 0.5 to 1.5 bytes per weight."""
        itemsize = 1.25 if self.is_quantized else ELEMENT_TYPES[self.element].size_bytes
        is_screened = (
            self.dtype == "fp32" and self.target == "ort" and should_screen(config, self.screen)
        )
        screen = screen_bytes(config) if is_screened else 0
        return int(config.num_parameters * itemsize) + screen + 2**22

    def write(
        self, source: WeightSource, folder: Path, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        """Trace without weights, then stream the weights to the external data file.

        Raises:
            InputError: the target has no kernel for a shape of the model.
        """
        self._check_shapes(source.config)
        with tempfile.TemporaryDirectory(prefix="calibrated-", dir=folder) as scratch:
            quantizer = self._quantizer(source, folder, Path(scratch), progress)
            return self._write(source, folder, quantizer, progress)

    def _check_shapes(self, config: Gemma3Config) -> None:
        if self.target in FUSED_TARGETS and config.head_dim % ATTENTION_MULTIPLE:
            raise InputError(
                f"head_dim is {config.head_dim}, but ONNX Runtime's fused attention takes "
                f"multiples of {ATTENTION_MULTIPLE}; use --target portable (fp32), or export to "
                "torchscript"
            )

    def _write(
        self, source: WeightSource, folder: Path, quantizer: Quantizer | None, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        config = source.config
        progress("tracing", 0, 1)
        dtype = torch_dtype(self.element)
        model, recipes = trace_onnx(config, self.target, dtype, self.opset or OPSET_VERSION)
        plan = self._plan(config, recipes, quantizer)
        apply_passes(MODEL_PASSES, model, plan)
        recipes = quantized_recipes(recipes, plan.quantized)
        progress("tracing", 1, 1)

        path = folder / self.path
        path.parent.mkdir(exist_ok=True)
        data = path.with_name(path.name + "_data")
        total = stored_bytes(recipes, config, self.element)
        total += screen_bytes(config) if plan.is_screened else 0
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
        min_onnxruntime = minimum_onnxruntime(model)
        hashes = {data: digest}
        windowed: Path | None = None
        if self.target == "ort" and has_sliding_layers(config):
            windowed = path.with_name(f"{path.stem}_windowed.onnx")
            hashes |= write_sliding_window_graph(model, plan, windowed, count)
        graph = Graph(
            takes_no_logits=True,
            runtime=self.runtime,
            path=self.path,
            dtype=self.dtype,
            target=self.target,
            cache_dtype=self.element,
            residual_dtype="float32" if has_wide_residual(dtype) else self.element,
            weights=recipes,
            windowed_path=windowed.relative_to(folder).as_posix() if windowed else None,
            is_screened=plan.is_screened,
            max_kld=self.budget,
            calibration=quantizer.calibration if quantizer else None,
            min_onnxruntime=min_onnxruntime,
        )
        return graph, {file.relative_to(folder).as_posix(): sha for file, sha in hashes.items()}

    def _plan(
        self,
        config: Gemma3Config,
        recipes: Mapping[str, WeightRecipe],
        quantizer: Quantizer | None,
    ) -> GraphPlan:
        quantized = {}
        if quantizer is not None:
            quantized = quantized_shapes(
                recipes, quantizer, config, self.element, transposed=self.is_per_channel
            )
        return GraphPlan(
            config=config,
            target=self.target,
            dtype=self.dtype,
            cache_dtype=self.element,
            quantized=quantized,
            is_screened=self._is_screened(config, is_head_quantized=config.head_name in quantized),
        )

    def _is_screened(self, config: Gemma3Config, *, is_head_quantized: bool) -> bool:
        """Return whether ``model_windowed.onnx`` screens its head.

        Raises:
            InputError: screening is requested but impossible.
        """
        is_float32 = not is_head_quantized and self.element == "float32"
        if self.target == "ort" and is_float32 and has_sliding_layers(config):
            return should_screen(config, self.screen)
        if self.screen:
            raise InputError(
                "--screen requires a float32 head, sliding-window layers and --target ort; this "
                f"export has --dtype {self.dtype}, --target {self.target} and layers of type "
                f"{', '.join(sorted(set(config.layer_types)))}; omit --screen"
            )
        return False

    def _quantizer(
        self, source: WeightSource, folder: Path, scratch: Path, progress: Progress
    ) -> Quantizer | None:
        if self.dtype == "keep":
            return GgufRepacker(source=source)
        if self.dtype == "int8" or self.is_per_channel:
            shapes = dict(source.config.weight_shapes())
            formats = {
                name: rotated_rows(name, shapes[name][1], self.target)
                if self.has_rotated_rows
                else self._format(bits=8)
                for name in matrix_names(source.config)
            }
            smoothing = {}
            if self.is_per_channel:
                smoothing = measure_smoothing(source, tokenizer_in(folder), progress)
                formats |= {name: replace(formats[name], is_smoothed=True) for name in smoothing}
            return RoundToNearest(source=source, formats=formats, smoothing=smoothing)
        if EXPORT_DTYPES[self.dtype].is_calibrated:
            formats = dict.fromkeys(matrix_names(source.config), self._format(bits=4))
            check_formats(source.config, formats)
            q4_0 = self._q4_0(source, progress)
            is_compared = source.config.num_parameters <= COMPARED_PARAMETERS
            if q4_0 is not None and (self.rounding == "q4_0" or not is_compared):
                return q4_0
            text = self.calibration.load(source, tokenizer_in(folder), progress)
            if q4_0 is not None:
                return compare_with_gptq(q4_0, text, scratch, progress)
            if self.dtype == "int4":
                return GptqQuantizer(source, text, scratch, progress).quantize(formats)
            return quantize_mixed(source, text, self.block_size, self.budget, scratch, progress)
        return None

    def _q4_0(self, source: WeightSource, progress: Progress) -> GgufRounding | None:
        """Return Q4_0's own rounding if it is requested, or if the weights were trained for it."""
        if self.dtype != "int4" or self.block_size != GRID.block_size:
            return None
        progress("looking for Q4_0's grid", 0, 1)
        reason = reason_for_q4_0(source, self.rounding)
        rounding = None if reason is None else GgufRounding.of(source, reason)
        progress("looking for Q4_0's grid", 1, 1)
        return rounding

    def _format(self, bits: int) -> BlockFormat:
        return BlockFormat(bits=bits, block_size=self.block_size, scale_type=self.element)


def write_sliding_window_graph(
    model: ir.Model, plan: GraphPlan, path: Path, on_write: OnWrite
) -> dict[Path, str]:
    """Turn ``model`` into the sliding-window graph, and write it to ``path``.

    Returns:
        The SHA-256 of each data file that belongs to this graph alone.
    """
    apply_passes(SLIDING_WINDOW_PASSES, model, plan)
    hashes: dict[Path, str] = {}
    if plan.is_screened:
        data = path.with_name(path.name + "_data")
        hashes[data] = write_screen(model.graph, plan.config, data, on_write)
    ir.save(model, path)
    return hashes


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that was saved to a bundle, if any."""
    path = folder / TOKENIZER_NAME
    return load_tokenizer(path) if is_file(path) else None


def stored_bytes(recipes: Mapping[str, WeightRecipe], config: Gemma3Config, dtype: DType) -> int:
    """Return the size of all stored tensors."""
    canonical = dict(config.weight_shapes())
    total = 0
    for recipe in recipes.values():
        shapes = [canonical[name] for name in recipe.names]
        if recipe.blocks is not None:
            total += recipe.blocks.size_bytes(sum(shape[0] for shape in shapes), shapes[0][1])
            continue
        is_vector = len(shapes[0]) == 1  # norm weights, which stay float32
        itemsize = 4 if is_vector else ELEMENT_TYPES[dtype].size_bytes
        total += sum(math.prod(shape) for shape in shapes) * itemsize
    return total
