"""Read the canonical weights back out of an ONNX bundle.

Recipes are inverted: transposed tensors are turned back, packed ones cut apart, quantised ones
dequantised. So a bundle can be
verified, or loaded into the reference, without the weights that it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gemma3_export.bundle.bundle import Bundle, WeightRecipe
from gemma3_export.errors import InputError
from gemma3_export.reference.weights import WeightSource
from gemma3_export.reference.weights.stored_blocks import StoredBlocks

__all__ = ["BundleWeights"]


class BundleWeights(WeightSource):
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
                self._locate(StoredBlocks(initializers, name, recipe.blocks), recipe, path)
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
            if isinstance(tensor, StoredBlocks):
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
