"""The graph writer for TorchScript archives: ``torchscript/model.ts``."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from gemma3_export.bundle import (
    BlockFormat,
    Graph,
    WeightRecipe,
    graph_stem,
    sha256_of,
    variant_name,
)
from gemma3_export.config import CONFIG_NAME, Gemma3Config, config_to_json
from gemma3_export.dtypes import (
    ELEMENT_TYPES,
    EXPORT_DTYPES,
    DType,
    element_type,
    export_dtype,
    require_max_kld,
    torch_dtype,
)
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_writer import half_precision
from gemma3_export.exporters.decoder_step import DecoderStep, example_inputs
from gemma3_export.exporters.packed_projections import weight_recipes
from gemma3_export.exporters.quantize.quantizers import Quantizer, RoundToNearest, matrix_names
from gemma3_export.exporters.torch.modules import TorchScriptGemma3, install_matrices
from gemma3_export.parity.options import HalfPrecision
from gemma3_export.progress import Progress
from gemma3_export.reference.weights import WeightSource, check_finite
from gemma3_export.reference.weights.block_matrix import BlockMatrix
from gemma3_export.runtimes.torch.torchscript import torchscript
from gemma3_export.staging import check_disk_space

__all__ = ["TorchScriptWriter"]

BLOCK_SIZE = 128  # for int8; smaller blocks are slower, because each block is a product of its own


@dataclass(frozen=True, kw_only=True)
class TorchScriptWriter:
    """A :class:`gemma3_export.exporters.bundle_writer.GraphWriter` for TorchScript.

    Args:
        dtype: one of :func:`gemma3_export.dtypes.dtype_choices` for ``torchscript``; with ``int8``,
            everything that is not in blocks is bfloat16.
        prepack: make matrices prepack themselves for the CPU when the archive is loaded; False
            makes an archive for torch builds without oneDNN.
        block_size: columns of an ``int8`` matrix that share a scale.
        max_kld: largest divergence from full precision at which the export passes, in mean nats
            per token; defaults to that of ``dtype``.

    Raises:
        InputError: unknown dtype, an impossible block size or budget, or int8 without prepacking.
    """

    runtime: ClassVar[str] = "torchscript"
    dtype: str = "fp32"
    prepack: bool = True
    block_size: int = BLOCK_SIZE
    max_kld: float | None = None

    def __post_init__(self) -> None:
        export_dtype(self.dtype, self.runtime)
        require_max_kld(self.budget)
        if self.is_quantized:
            BlockFormat(bits=8, block_size=self.block_size)
            if not self.prepack:
                raise InputError(
                    "--no-prepack cannot be combined with int8, which always needs oneDNN; omit "
                    "--no-prepack, or choose --dtype bf16"
                )

    @property
    def budget(self) -> float:
        """Largest divergence at which the export passes, in mean nats per token."""
        return EXPORT_DTYPES[self.dtype].max_kld if self.max_kld is None else self.max_kld

    @property
    def is_quantized(self) -> bool:
        """True if matrices are stored in blocks of integers."""
        return EXPORT_DTYPES[self.dtype].is_quantized

    @property
    def element(self) -> DType:
        """Element type of the cache and of everything that is not quantized."""
        return element_type("bf16" if self.is_quantized else self.dtype).name

    @property
    def path(self) -> str:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return f"torchscript/{graph_stem(self.dtype)}.ts"

    @property
    def variant(self) -> str:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return variant_name(self.dtype)

    @property
    def half(self) -> HalfPrecision | None:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return half_precision(torch_dtype(self.element), holds_residual=True)

    def size_bytes(self, config: Gemma3Config) -> int:
        """Return about how much space the file needs."""
        itemsize = 1.25 if self.is_quantized else ELEMENT_TYPES[self.element].size_bytes
        return int(config.num_parameters * itemsize) + 2**22

    def write(
        self, source: WeightSource, folder: Path, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        """Load packed weights, trace, and save the archive."""
        dtype = torch_dtype(self.element)
        path = folder / self.path
        path.parent.mkdir(exist_ok=True)
        with torchscript(), torch.inference_mode():
            model, recipes, blocks = load_packed(source, dtype, self._quantizer(source), progress)
            install_matrices(model, blocks, prepack=self.prepack)
            blocks.clear()
            progress("tracing", 0, 1)
            trace: Any = torch.jit.trace  # untyped
            archive = trace(
                DecoderStep(model).eval(),
                example_inputs(source.config, dtype=dtype),
                check_trace=False,  # the parity check is stricter
            )
            progress("tracing", 1, 1)
            progress("writing weights", 0, 1)
            # Services that have only the archive read shapes and stop tokens from this.
            config = json.dumps(config_to_json(source.config), indent=2)
            check_disk_space(path, self.size_bytes(source.config))
            archive.save(str(path), _extra_files={CONFIG_NAME: config})
            strip_debug_records(path)
            progress("writing weights", 1, 1)
        graph = Graph(
            takes_no_logits=True,
            runtime=self.runtime,
            path=self.path,
            dtype=self.dtype,
            target="prepacked" if self.prepack and not self.is_quantized else "plain",
            cache_dtype=self.element,
            weights=recipes,
            max_kld=self.budget,
        )
        return graph, {graph.path: sha256_of(path)}

    def _quantizer(self, source: WeightSource) -> Quantizer | None:
        if not self.is_quantized:
            return None
        block_format = BlockFormat(bits=8, block_size=self.block_size)
        formats = dict.fromkeys(matrix_names(source.config), block_format)
        return RoundToNearest(source=source, formats=formats)


def load_packed(
    source: WeightSource, dtype: torch.dtype, quantizer: Quantizer | None, progress: Progress
) -> tuple[TorchScriptGemma3, dict[str, WeightRecipe], dict[str, BlockMatrix]]:
    """Load the packed model, one tensor at a time.

    Returns:
        The model, the recipes of its tensors, and the quantized matrices by name. The model has no
        values for these.

    Raises:
        InputError: a weight holds NaN or infinity.
    """
    with torch.device("meta"):
        model = TorchScriptGemma3(source.config)
    recipes = weight_recipes(model)
    blocks: dict[str, BlockMatrix] = {}
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    total = sum(parameter.nbytes for parameter in parameters.values())
    done = 0
    for name, recipe in recipes.items():
        if quantizer is not None and parameters[name].ndim == 2:
            recipes[name] = replace(recipe, blocks=quantizer.format(recipe.names))
            blocks[name] = BlockMatrix.stack(list(quantizer.matrices(recipes[name])))
            done += parameters[name].nbytes
            progress("reading weights", done, total)
            continue
        start = 0
        for source_name in recipe.names:
            for chunk in source.chunks(source_name):
                check_finite(source_name, chunk)
                parameters[name][start : start + chunk.shape[0]] = chunk.to(dtype)
                start += chunk.shape[0]
        done += parameters[name].nbytes
        progress("reading weights", done, total)
    return model, recipes, blocks


# torch always stores the source file and line of every traced operation. They name folders of the
# exporting machine, and nothing needs them to run.
DEBUG_SUFFIX = ".debug_pkl"


def strip_debug_records(path: Path) -> None:
    """Remove the debug records from the archive at ``path``, in place.

    An archive is a zip file with weights before code, so only the part after the first debug record
    has to be rewritten.
    """
    with zipfile.ZipFile(path, "a") as archive:
        entries = archive.infolist()
        debug = [entry for entry in entries if entry.filename.endswith(DEBUG_SUFFIX)]
        if not debug:
            return
        first = entries.index(debug[0])
        rest = [entry for entry in entries[first:] if entry not in debug]
        assert not any("/data/" in entry.filename for entry in rest), "weights come before code"
        kept = [(entry, archive.read(entry)) for entry in rest]
        for entry in entries[first:]:
            archive.filelist.remove(entry)
            del archive.NameToInfo[entry.filename]
        assert archive.fp is not None
        archive.start_dir = debug[0].header_offset  # where the archive appends
        archive.fp.seek(debug[0].header_offset)
        archive.fp.truncate()
        for entry, content in kept:
            archive.writestr(entry.filename, content, compress_type=entry.compress_type)
