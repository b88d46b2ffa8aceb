"""Canonical weights read back from a bundle's graph.

The recipes of the manifest are inverted: transposed tensors are transposed back, packed tensors
split, quantized tensors dequantized. So a bundle can be verified, or loaded into the reference
model, without the checkpoint that it was made from.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from gemma3_export.bundle import (
    CODES,
    MINIMUMS,
    MODEL_PREFIX,
    SCALES,
    SMOOTHING,
    BlockFormat,
    Bundle,
    WeightRecipe,
    block_tensors,
)
from gemma3_export.errors import InputError
from gemma3_export.files import is_file
from gemma3_export.reference.weights.block_matrix import BlockMatrix, unpack_codes, unsigned_codes
from gemma3_export.reference.weights.source import WeightSource
from gemma3_export.runtimes.torch.runtime import ArchiveRuntime, Pt2Runtime, TorchScriptRuntime

__all__ = ["ArchiveWeights", "BundleWeights", "OnnxWeights", "open_bundle_weights"]

ARCHIVES: dict[str, type[ArchiveRuntime]] = {
    "torchscript": TorchScriptRuntime,
    "pt2": Pt2Runtime,
}


def open_bundle_weights(
    bundle: Bundle, runtime: str | None = None, *, trust: bool = False
) -> BundleWeights:
    """Open the weights of the graph for ``runtime``, or of any graph if there is none.

    Args:
        bundle: the bundle, seen through the variant whose weights to open.
        runtime: the preferred runtime; None takes the first that has a graph.
        trust: load a torch archive whose hash differs from the manifest.

    Raises:
        InputError: the graph cannot be read or contradicts the config.
    """
    chosen = runtime if runtime in bundle.runtimes else bundle.first_graph.runtime
    if chosen != "onnx":
        return ArchiveWeights(bundle, chosen, trust=trust)
    return OnnxWeights(bundle)


class StoredMatrix(Protocol):
    """A tensor of a graph's weight file, whose canonical weights are ranges of rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape before transposing or quantizing: [rows, columns], or [rows] of a vector."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type that :meth:`read` returns."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of rows [start, stop)."""


class BundleWeights(WeightSource):
    """The canonical weights of one graph of a bundle.

    Raises:
        InputError: the graph lacks a weight that its config needs, or has another shape.
    """

    def __init__(self, bundle: Bundle, runtime: str, origin: str) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.origin = origin
        self.recipes = bundle.graph(runtime).weights
        self._rows: dict[str, tuple[StoredMatrix, int]] = {}  # canonical name to its first row
        for name, recipe in self.recipes.items():
            matrix = self._open_matrix(name, recipe)
            if matrix is not None:
                self._assign_rows(matrix, recipe)
        if missing := self._shapes.keys() - self._rows.keys():
            raise InputError(
                f"{self.origin} lacks {len(missing)} weights of its config, such as "
                f"{', '.join(sorted(missing)[:3])}; export the bundle again"
            )

    @abstractmethod
    def _open_matrix(self, name: str, recipe: WeightRecipe) -> StoredMatrix | None:
        """Return the stored tensor ``name``, None if the graph lacks it."""

    def _assign_rows(self, matrix: StoredMatrix, recipe: WeightRecipe) -> None:
        rows = 0
        for name in recipe.names:
            if name not in self._shapes:
                raise InputError(
                    f"{self.origin} stores {name}, which its config does not have; config.json or "
                    "the graph was changed; export the bundle again"
                )
            self._rows[name] = (matrix, rows)
            rows += self._shapes[name][0]
        expected = (rows, *self._shapes[recipe.names[0]][1:])
        if matrix.shape != expected:
            raise InputError(
                f"{self.origin} stores {' + '.join(recipe.names)} as {list(matrix.shape)}, but its "
                f"config needs {list(expected)}; config.json or the graph was changed"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See :meth:`WeightSource.read`."""
        start, stop = self._row_range(name, start, stop)
        matrix, first = self._rows[name]
        try:
            return matrix.read(first + start, first + stop)
        except Exception as error:  # missing or truncated external data
            raise InputError(
                f"{self.origin}: cannot read {name} ({error}); copy the bundle again"
            ) from error

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :meth:`WeightSource.stored_dtype`."""
        return self._rows[name][0].dtype

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of the weights that the bundle was made from."""
        return self.bundle.manifest.source


# ONNX graphs


class OnnxWeights(BundleWeights):
    """The weights of a bundle's ONNX graph, memory-mapped from its external data.

    Raises:
        InputError: the graph cannot be read, or does not fit its config.
    """

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.file(bundle.graph("onnx").path)
        try:
            self._initializers: Mapping[str, ir.Value] = ir.load(path).graph.initializers
        except Exception as error:  # protobuf and onnx_ir have no common error type
            raise InputError(f"{path} cannot be read: {error}; export the bundle again") from error
        for stored in self._initializers.values():
            if isinstance(stored.const_value, ir.ExternalTensor):
                stored.const_value = resolved(stored.const_value, bundle, path)
        super().__init__(bundle, "onnx", origin=str(path))

    def _open_matrix(self, name: str, recipe: WeightRecipe) -> StoredMatrix | None:
        if recipe.blocks is not None:
            return OnnxBlocks(
                self._initializers, name, recipe.blocks, is_transposed=recipe.transposed
            )
        value = self._initializers.get(name)
        if value is None or value.const_value is None:
            return None
        return OnnxTensor(value.const_value, is_transposed=recipe.transposed)

    @property
    def activation_blocks(self) -> Mapping[str, BlockFormat]:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        return {
            name: recipe.blocks
            for recipe in self.recipes.values()
            if recipe.blocks is not None and recipe.blocks.scale_type == "float32"
            for name in recipe.names
        }

    @property
    def smoothing(self) -> Mapping[str, torch.Tensor]:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        return {
            name: matrix.smoothing
            for name, (matrix, _) in self._rows.items()
            if isinstance(matrix, OnnxBlocks) and matrix.smoothing is not None
        }


class OnnxTensor:
    """A float tensor of an ONNX graph; see :class:`StoredMatrix`."""

    def __init__(self, tensor: ir.TensorProtocol, *, is_transposed: bool) -> None:
        self.tensor, self.is_transposed = tensor, is_transposed

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape before transposing."""
        shape = tuple(self.tensor.shape.numpy())
        return shape[::-1] if self.is_transposed else shape

    @property
    def dtype(self) -> torch.dtype:
        """Element type in the file."""
        return self.read(0, 1).dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of rows [start, stop)."""
        array = self.tensor.numpy()  # a view of the mapped file
        rows = array[:, start:stop].T if self.is_transposed else array[start:stop]
        return torch_tensor(self.tensor, rows)


class OnnxBlocks:
    """A quantized matrix of an ONNX graph; see :class:`StoredMatrix`.

    Raises:
        InputError: tensors are missing, or do not have the shapes of the format.
    """

    dtype = torch.float32

    def __init__(
        self,
        initializers: Mapping[str, ir.Value],
        name: str,
        block_format: BlockFormat,
        *,
        is_transposed: bool,
    ) -> None:
        keys = [CODES, SCALES]
        keys += [MINIMUMS] if block_format.has_minimum else []
        keys += [SMOOTHING] if block_format.is_smoothed else []
        self.format = block_format
        self.tensors = {key: initializer(initializers, f"{name}.{key}") for key in keys}
        self.is_transposed = is_transposed
        rows, *blocks = self.tensors[SCALES].shape.numpy()[:2]
        self.shape = (rows, math.prod(blocks) * block_format.block_size)
        expected = block_tensors(name, block_format, *self.shape, transposed=is_transposed)
        for key, tensor in self.tensors.items():
            if tuple(tensor.shape) != expected[key].shape:
                raise InputError(
                    f"the graph stores {name}.{key} as {list(tensor.shape)}, but its format "
                    f"({block_format}) needs {list(expected[key].shape)}; export the bundle again"
                )

    @property
    def smoothing(self) -> torch.Tensor | None:
        """The factor of each input, if the matrix is smoothed."""
        tensor = self.tensors.get(SMOOTHING)
        return None if tensor is None else torch_tensor(tensor, tensor.numpy())

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop), dequantized."""
        if self.is_transposed:
            codes = torch_tensor(self.tensors[CODES], self.tensors[CODES].numpy()[:, start:stop].T)
            scales = torch_tensor(self.tensors[SCALES], self.tensors[SCALES].numpy()[start:stop])
            codes = unsigned_codes(codes, self.format)
            return BlockMatrix(
                self.format, codes, scales[:, None], smoothing=self.smoothing
            ).dequantize()
        part = {
            key: torch_tensor(tensor, tensor.numpy()[start:stop])
            for key, tensor in self.tensors.items()
        }
        codes = unpack_codes(part[CODES], self.format)
        matrix = BlockMatrix(self.format, codes, part[SCALES].float(), part.get(MINIMUMS))
        return matrix.dequantize()


def torch_tensor(tensor: ir.TensorProtocol, rows: Any) -> torch.Tensor:
    """Return ``rows`` of the values of ``tensor``, copied."""
    copied = np.array(rows, order="C")
    if tensor.dtype == ir.DataType.BFLOAT16:  # torch cannot convert numpy's bfloat16
        return torch.from_numpy(copied.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(copied)


def initializer(initializers: Mapping[str, ir.Value], name: str) -> ir.TensorProtocol:
    """Return the value of an initializer with one to three axes.

    Raises:
        InputError: the graph has none of this name.
    """
    value = initializers.get(name)
    if value is None or value.const_value is None or len(value.const_value.shape) not in (1, 2, 3):
        raise InputError(
            f"the graph lacks {name}, which its manifest lists; export the bundle again"
        )
    return value.const_value


def resolved(tensor: ir.ExternalTensor, bundle: Bundle, graph: Path) -> ir.ExternalTensor:
    """Return ``tensor`` with the real path of its file, which may be a link, as in the Hub's cache.

    onnx_ir rejects links out of the graph's folder and files with several hard links. Those are
    safe here because the manifest lists the file with its hash.

    Raises:
        InputError: the graph refers to a file outside of the bundle.
    """
    location = PurePosixPath(tensor.location)
    relative = (PurePosixPath(bundle.graph("onnx").path).parent / location).as_posix()
    if relative not in bundle.manifest.files:
        raise InputError(
            f"{graph} reads {str(location)!r:.80}, which is not among the bundle's files; export "
            "the bundle again"
        )
    file = bundle.file(relative).resolve()
    if not is_file(file):
        raise InputError(f"{bundle.file(relative)} is missing or not a file; copy the bundle again")
    return ir.ExternalTensor(
        file,  # without base_dir, which would have to contain it
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
    )


# Torch archives


class ArchiveWeights(BundleWeights):
    """The weights of a bundle's torch archive, which is loaded as its runtime loads it.

    Raises:
        InputError: the archive was changed, or does not fit its config.
    """

    def __init__(self, bundle: Bundle, runtime: str, *, trust: bool = False) -> None:
        self._module = ARCHIVES[runtime](bundle, device="cpu", trust=trust).module
        super().__init__(bundle, runtime, origin=f"the {runtime} archive in {bundle.path}")

    def _open_matrix(self, name: str, recipe: WeightRecipe) -> StoredMatrix:
        owner = owner_of(self._module, name)
        if recipe.blocks is not None:
            return ArchiveBlocks(owner, recipe.blocks)
        tensor: torch.Tensor = getattr(owner, name.rpartition(".")[2])
        return ArchiveTensor(tensor if tensor.numel() else owner.packed)


class ArchiveTensor:
    """A float tensor of a torch archive; see :class:`StoredMatrix`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of rows [start, stop)."""
        # Converting from oneDNN's layout is exact.
        tensor = self.tensor.to_dense() if self.tensor.is_mkldnn else self.tensor
        return tensor[start:stop].clone()


class ArchiveBlocks:
    """A quantized matrix of a torch archive; see :class:`StoredMatrix`.

    Args:
        matrix: a :class:`gemma3_export.exporters.torch.matrix.BlockedMatrix` of a loaded archive.
        block_format: its format.
    """

    dtype = torch.float32

    def __init__(self, matrix: Any, block_format: BlockFormat) -> None:
        self.codes: torch.Tensor = matrix.codes  # [G, N, block] int8
        self.scales: torch.Tensor = matrix.scales  # [G, N]
        self.format = block_format
        groups, rows, size = self.codes.shape
        self.shape: tuple[int, ...] = (rows, groups * size)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop), dequantized."""
        codes = self.codes[:, start:stop].transpose(0, 1).flatten(1)
        codes = unsigned_codes(codes, self.format)
        scales = self.scales[:, start:stop].t().contiguous()
        return BlockMatrix(self.format, codes, scales).dequantize()


def owner_of(module: Any, name: str) -> Any:
    """Return the module that holds a parameter in a loaded archive."""
    *path, _ = f"{MODEL_PREFIX}.{name}".split(".")
    owner = module
    for part in path:
        # In TorchScript, the matrix of an untied head belongs to the head itself.
        owner = getattr(owner, "head" if part == "lm_head" and not hasattr(owner, part) else part)
    return getattr(owner, "matrix", owner)
