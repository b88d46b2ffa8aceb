"""The weights inside a bundle, whichever graph holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gemma3_export.bundle import (
    CODES,
    MINIMUMS,
    MODEL_PREFIX,
    SCALES,
    BlockFormat,
    Bundle,
    WeightRecipe,
    block_tensors,
)
from gemma3_export.errors import InputError
from gemma3_export.reference.weights.block_matrix import BlockMatrix, unpack_codes
from gemma3_export.reference.weights.source import WeightSource
from gemma3_export.runtimes.torch.runtime import ArchiveRuntime, Pt2Runtime, TorchScriptRuntime

__all__ = [
    "ArchiveWeights",
    "OnnxBlocks",
    "OnnxWeights",
    "open_bundle_weights",
]

ARCHIVES: dict[str, type[ArchiveRuntime]] = {
    "torchscript": TorchScriptRuntime,
    "pt2": Pt2Runtime,
}


def open_bundle_weights(
    bundle: Bundle, runtime: str | None = None, *, trust: bool = False
) -> WeightSource:
    """Canonical weights read back from the graph for ``runtime``, or from any graph.

    Raises:
        InputError: the graph cannot be read or contradicts the config.
    """
    runtimes = [graph.runtime for graph in bundle.manifest.graphs]
    chosen = runtime if runtime in runtimes else runtimes[0]
    if chosen != "onnx":
        return ArchiveWeights(bundle, chosen, trust=trust)
    return OnnxWeights(bundle)


# Read a quantised matrix back out of an ONNX graph's initializers.


class OnnxBlocks:
    """One quantised matrix of a graph, mapped from its file.

    Raises:
        InputError: parts are missing, or do not have the shapes of the format.
    """

    def __init__(
        self, initializers: Mapping[str, ir.Value], name: str, block_format: BlockFormat
    ) -> None:
        keys = (CODES, SCALES, MINIMUMS) if block_format.has_minimum else (CODES, SCALES)
        self.format = block_format
        self.parts = {key: tensor_of(initializers, f"{name}.{key}") for key in keys}
        rows, blocks = self.parts[SCALES].shape.numpy()[:2]
        self.shape = (rows, blocks * block_format.block_size)
        expected = block_tensors(name, block_format, *self.shape)
        for key, tensor in self.parts.items():
            if tuple(tensor.shape) != expected[key].shape:
                raise InputError(
                    f"the graph stores {name}.{key} as {list(tensor.shape)}, but its format "
                    f"({block_format}) needs {list(expected[key].shape)}; export the bundle anew"
                )

    def blocks(self, start: int, stop: int) -> BlockMatrix:
        """Rows [start, stop) as they are stored."""
        part = {key: read_rows(tensor, start, stop) for key, tensor in self.parts.items()}
        codes = unpack_codes(part[CODES], self.format)
        return BlockMatrix(self.format, codes, part[SCALES].float(), part.get(MINIMUMS))


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a stored tensor, copied."""
    rows = np.array(tensor.numpy()[start:stop])
    if tensor.dtype == ir.DataType.BFLOAT16:  # which torch does not take from numpy
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


def tensor_of(initializers: Mapping[str, ir.Value], name: str) -> ir.TensorProtocol:
    """The stored tensor ``name``.

    Raises:
        InputError: there is none of two axes or three.
    """
    value = initializers.get(name)
    if value is None or value.const_value is None or len(value.const_value.shape) not in (2, 3):
        raise InputError(f"the graph lacks {name}, which its manifest names; export it anew")
    return value.const_value


# Read the canonical weights back out of an ONNX bundle.
#
# Recipes are inverted: transposed tensors are turned back, packed ones cut apart, quantised ones
# dequantised. So a bundle can be
# verified, or loaded into the reference, without the weights that it came from.


class OnnxWeights(WeightSource):
    """The weights of a bundle's ONNX graph, mapped from its external data.

    Raises:
        InputError: the graph cannot be read, or lacks a weight that its config needs.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.config = bundle.config
        self.origin = f"the ONNX graph in {bundle.path}"
        self.bundle = bundle
        self.graph = bundle.graph("onnx")
        path = bundle.file(self.graph.path)
        try:
            initializers = ir.load(path).graph.initializers
        except Exception as error:  # protobuf and onnx_ir raise what they like
            raise InputError(f"{path} cannot be read: {error}; export the bundle anew") from error
        for stored in initializers.values():
            if isinstance(stored.const_value, ir.ExternalTensor):
                stored.const_value = resolved(stored.const_value, bundle, path)
        self.shapes = dict(self.config.weight_shapes())
        self.stored: dict[str, tuple[Any, WeightRecipe, int]] = {}
        for name, recipe in self.graph.weights.items():
            if recipe.blocks is not None:
                self._locate(OnnxBlocks(initializers, name, recipe.blocks), recipe, path)
                continue
            value = initializers.get(name)
            if value is not None and value.const_value is not None:
                self._locate(value.const_value, recipe, path)
        if missing := self.shapes.keys() - self.stored.keys():
            raise InputError(
                f"{path} lacks {len(missing)} weights of its config, such as "
                f"{', '.join(sorted(missing)[:3])}; export the bundle anew"
            )

    def _locate(self, tensor: Any, recipe: WeightRecipe, path: Path) -> None:
        rows = 0
        for name in recipe.names:
            if name not in self.shapes:
                raise InputError(f"{path} stores {name}, which its config does not have")
            self.stored[name] = (tensor, recipe, rows)
            rows += self.shapes[name][0]
        shape: tuple[int, ...] = (rows, *self.shapes[recipe.names[0]][1:])
        expected = shape[::-1] if recipe.transposed else shape
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{path} stores {' + '.join(recipe.names)} as {list(tensor.shape)}, but its "
                f"config needs {list(expected)}; config.json or the graph was changed"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        tensor, recipe, first = self.stored[name]
        stop = self.shapes[name][0] if stop is None else stop
        try:
            if isinstance(tensor, OnnxBlocks):
                return tensor.blocks(first + start, first + stop).dequantize()
            array = tensor.numpy()  # a view of the mapped file
        except Exception as error:  # missing or truncated external data
            raise InputError(f"{self.origin}: {name} cannot be read: {error}") from error
        rows = slice(first + start, first + stop)
        part = np.ascontiguousarray(array[:, rows].T if recipe.transposed else array[rows])
        if tensor.dtype == ir.DataType.BFLOAT16:  # which torch does not take from numpy
            return torch.from_numpy(part.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(part.copy())

    @property
    def activation_blocks(self) -> Mapping[str, int]:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        return {
            name: recipe.blocks.block_size
            for recipe in self.graph.weights.values()
            if recipe.blocks is not None and recipe.blocks.scale_type == "float32"
            for name in recipe.names
        }

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        return self.read(name, 0, 1).dtype

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the weights that the bundle was made from."""
        return self.bundle.manifest.source


def resolved(tensor: ir.ExternalTensor, bundle: Bundle, graph: Path) -> ir.ExternalTensor:
    """``tensor`` with the real path of its file, which may be a link, as in the Hub's cache.

    onnx_ir refuses links that lead out of the graph's folder, and files with several names. Here
    the file is one that the manifest lists with its hash, whatever lies behind its name.

    Raises:
        InputError: the graph names another file.
    """
    location = PurePosixPath(tensor.location)
    relative = (PurePosixPath(bundle.graph("onnx").path).parent / location).as_posix()
    if relative not in bundle.manifest.files:
        raise InputError(
            f"{graph} reads {str(location)!r:.80}, which is not among the bundle's files; export "
            "it anew"
        )
    file = bundle.file(relative).resolve()
    if not file.is_file():
        raise InputError(f"{bundle.file(relative)} is missing or no file; copy the bundle again")
    return ir.ExternalTensor(
        file,  # without a folder that it would have to lie in
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
    )


# Read the canonical weights back out of a torch archive: TorchScript's or torch.export's.


class ArchiveWeights(WeightSource):
    """The weights of a bundle's archive, which is loaded as its runtime would load it.

    Raises:
        InputError: the archive was changed, or lacks a weight that its config needs.
    """

    def __init__(self, bundle: Bundle, runtime: str, *, trust: bool = False) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.origin = f"the {runtime} archive in {bundle.path}"
        self.shapes = dict(self.config.weight_shapes())
        opened = ARCHIVES[runtime](bundle, device="cpu", trust=trust)
        module = opened.module
        self.stored: dict[str, tuple[torch.Tensor | ArchiveBlocks, int]] = {}
        for name, recipe in bundle.graph(runtime).weights.items():
            if recipe.blocks is None:
                self._locate(stored_tensor(module, name), recipe)
            else:
                self._locate(ArchiveBlocks(owner_of(module, name), recipe.blocks), recipe)
        if missing := self.shapes.keys() - self.stored.keys():
            raise InputError(
                f"{self.origin} lacks {len(missing)} weights of its config, such as "
                f"{', '.join(sorted(missing)[:3])}; export the bundle anew"
            )

    def _locate(self, tensor: torch.Tensor | ArchiveBlocks, recipe: WeightRecipe) -> None:
        start = 0
        for name in recipe.names:
            self.stored[name] = (tensor, start)
            start += self.shapes.get(name, (0,))[0]
        if tensor.shape[0] != start:
            raise InputError(
                f"{self.origin} stores {' + '.join(recipe.names)} with {tensor.shape[0]} rows, "
                f"but its config needs {start}; config.json or the archive was changed"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        tensor, first = self.stored[name]
        stop = self.shapes[name][0] if stop is None else stop
        if isinstance(tensor, ArchiveBlocks):
            return tensor.read(first + start, first + stop)
        if tensor.is_mkldnn:  # laid out for the CPU; the way back is exact
            tensor = tensor.to_dense()
        return tensor[first + start : first + stop].clone()

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        tensor = self.stored[name][0]
        return torch.float32 if isinstance(tensor, ArchiveBlocks) else tensor.dtype

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the weights that the bundle was made from."""
        return self.bundle.manifest.source


class ArchiveBlocks:
    """A quantised matrix of a loaded archive; see ``torchscript_matrix.BlockedMatrix``."""

    def __init__(self, matrix: Any, block_format: BlockFormat) -> None:
        self.codes: torch.Tensor = matrix.codes  # [G, N, block] int8
        self.scales: torch.Tensor = matrix.scales  # [G, N]
        self.format = block_format
        self.shape = (self.codes.shape[1],)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), dequantised."""
        codes = self.codes[:, start:stop].transpose(0, 1).flatten(1).to(torch.int16)
        codes = (codes + self.format.zero_point).to(torch.uint8)
        scales = self.scales[:, start:stop].t().contiguous()
        return BlockMatrix(self.format, codes, scales).dequantize()


def stored_tensor(module: Any, name: str) -> torch.Tensor:
    """The tensor behind a parameter's name in a loaded archive, packed or not."""
    owner = owner_of(module, name)
    tensor: torch.Tensor = getattr(owner, name.rpartition(".")[2])
    return tensor if tensor.numel() else owner.packed


def owner_of(module: Any, name: str) -> Any:
    """The module that holds a parameter in a loaded archive."""
    *path, _ = f"{MODEL_PREFIX}.{name}".split(".")
    owner = module
    for part in path:
        # An untied head's matrix belongs to the head itself in TorchScript.
        owner = getattr(owner, "head" if part == "lm_head" and not hasattr(owner, part) else part)
    return getattr(owner, "matrix", owner)
