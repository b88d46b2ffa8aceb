"""Read the canonical weights back out of a torch archive: TorchScript's or torch.export's."""

from __future__ import annotations

from typing import Any

import torch

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle.block_format import BlockFormat
from gemma3_export.bundle.bundle import Bundle, WeightRecipe
from gemma3_export.errors import InputError
from gemma3_export.exporters.step import DecoderStep
from gemma3_export.reference.weights import WeightSource
from gemma3_export.reference.weights.block_matrix import BlockMatrix
from gemma3_export.runtimes.torch.runtime import ArchiveRuntime

__all__ = ["ArchiveWeights"]


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
        opened = open_runtime(bundle, runtime, device="cpu", trust=trust)
        assert isinstance(opened, ArchiveRuntime)
        module = opened.module
        self.stored: dict[str, tuple[torch.Tensor | ArchivedBlocks, int]] = {}
        for name, recipe in bundle.graph(runtime).weights.items():
            if recipe.blocks is None:
                self._locate(stored_tensor(module, name), recipe)
            else:
                self._locate(ArchivedBlocks(owner_of(module, name), recipe.blocks), recipe)
        if missing := self.shapes.keys() - self.stored.keys():
            raise InputError(
                f"{self.origin} lacks {len(missing)} weights of its config, such as "
                f"{', '.join(sorted(missing)[:3])}; export the bundle anew"
            )

    def _locate(self, tensor: torch.Tensor | ArchivedBlocks, recipe: WeightRecipe) -> None:
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
        if isinstance(tensor, ArchivedBlocks):
            return tensor.read(first + start, first + stop)
        if tensor.is_mkldnn:  # laid out for the CPU; the way back is exact
            tensor = tensor.to_dense()
        return tensor[first + start : first + stop].clone()

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :class:`gemma3_export.reference.weights.WeightSource`."""
        tensor = self.stored[name][0]
        return torch.float32 if isinstance(tensor, ArchivedBlocks) else tensor.dtype

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the weights that the bundle was made from."""
        return self.bundle.manifest.source


class ArchivedBlocks:
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
    *path, _ = f"{DecoderStep.MODEL}.{name}".split(".")
    owner = module
    for part in path:
        # An untied head's matrix belongs to the head itself in TorchScript.
        owner = getattr(owner, "head" if part == "lm_head" and not hasattr(owner, part) else part)
    return getattr(owner, "matrix", owner)
