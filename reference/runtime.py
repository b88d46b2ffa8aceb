"""Run the reference model as a runtime, so that the generation loop and parity can use it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gemma3_export.config import Gemma3Config
from gemma3_export.reference.model import Gemma3
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVCache,
    Logits,
    PaddingSide,
    RuntimeInfo,
    check_step,
    num_logits_to_keep,
)
from gemma3_export.runtimes.torch.cache import TorchCache
from gemma3_export.runtimes.torch.tensors import as_numpy, device_of, dtype_of, to_device

__all__ = ["ReferenceRuntime"]


class ReferenceRuntime:
    """A runtime that runs :class:`gemma3_export.reference.model.Gemma3` in PyTorch.

    Logits and caches are returned in float32, or in float64 if the model is in float64.
    """

    def __init__(self, model: Gemma3) -> None:
        self.model = model.eval()
        self.config: Gemma3Config = model.config
        weight = model.model.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device

    @property
    def info(self) -> RuntimeInfo:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        dtype = dtype_of(self.dtype)
        return RuntimeInfo(
            name="reference",
            versions={"torch": torch.__version__},
            dtype=dtype,
            compute_dtype=dtype,
            device=device_of(self.device),
            threads=torch.get_num_threads(),
        )

    @property
    def padding_side(self) -> PaddingSide:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`."""
        return "left"

    @torch.inference_mode()
    def run_padded(
        self, input_ids: IntArray, attention_mask: IntArray
    ) -> tuple[Logits, list[NDArray[np.float32]]]:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`."""
        ids, mask = (to_device(array, self.device) for array in (input_ids, attention_mask))
        output = self.model(ids, mask)
        present = [as_numpy(tensor) for pair in output.past_key_values for tensor in pair]
        return as_numpy(output.logits), present

    def new_cache(self, batch_size: int, capacity: int) -> TorchCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        return TorchCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        assert isinstance(cache, TorchCache)
        check_step(cache, input_ids, num_logits, row)
        count, new = input_ids.shape
        rows = slice(row, row + count)
        mask, past = cache.prepare(new, rows)
        output = self.model(
            torch.from_numpy(input_ids).to(self.device),
            mask,
            list(zip(past[::2], past[1::2], strict=True)),
            num_logits_to_keep=num_logits_to_keep(num_logits, new),
        )
        present = [tensor for pair in output.past_key_values for tensor in pair]
        cache.accept(present, new, rows)
        return as_numpy(output.logits)
