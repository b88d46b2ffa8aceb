"""Run Hugging Face transformers behind the runtime protocol, as an independent baseline.

Each row has its own cache, so no padding is involved. This is for comparison, not for speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma3_export.config import CONFIG_NAME, Gemma3Config, load_config
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import to_path
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVCache,
    LayerKV,
    Logits,
    RuntimeInfo,
    check_rows,
    check_step,
    check_truncation,
    empty_lengths,
    num_logits_to_keep,
)
from gemma3_export.runtimes.torch.tensors import device_of, dtype_of

__all__ = ["TransformersRuntime"]


class TransformersCache:
    """One dynamic transformers cache per row."""

    def __init__(self, caches: list[Any], lengths: IntArray, capacity: int) -> None:
        self.caches = caches
        self.lengths = lengths
        self.capacity = capacity

    @property
    def batch_size(self) -> int:
        """Return the number of rows."""
        return len(self.caches)

    def read(self, row: int) -> list[LayerKV]:
        """Return (key, value) per layer, each [K, L, H] float32."""
        return [
            (layer.keys[0].float().numpy(), layer.values[0].float().numpy())
            for layer in self.caches[row].layers
        ]

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""
        check_truncation(self, row, length)
        self.caches[row].crop(length - int(self.lengths[row]))  # a negative length removes tokens
        self.lengths[row] = length

    def swap(self, row: int, other: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""
        check_rows(self, row, other)
        caches = self.caches
        caches[row], caches[other] = caches[other], caches[row]
        self.lengths[[row, other]] = self.lengths[[other, row]]


class TransformersRuntime:
    """A :class:`gemma3_export.runtimes.protocol.Runtime` over ``AutoModelForCausalLM``.

    Args:
        folder: a model in Hugging Face format (``config.json`` and safetensors).
        dtype: compute precision.
        vocab_size: logits to return, from the first on; None returns those of all rows of the
            embedding, padding included.

    Raises:
        UnavailableError: transformers is not installed.
        InputError: transformers cannot load the folder.
    """

    def __init__(
        self,
        folder: Path | str,
        dtype: torch.dtype = torch.float32,
        vocab_size: int | None = None,
    ) -> None:
        folder = to_path(folder, "the folder of the model")
        try:
            import transformers
        except ImportError as error:
            raise UnavailableError(
                "the package transformers is not installed; run: pip install transformers"
            ) from error
        self.config: Gemma3Config = load_config(folder / CONFIG_NAME)
        self.transformers = transformers
        self.dtype = dtype
        self.vocab_size = vocab_size
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError) as error:
            raise InputError(f"transformers cannot load {folder}: {error}") from error
        self.model.eval()

    @property
    def info(self) -> RuntimeInfo:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        dtype = dtype_of(self.dtype)
        return RuntimeInfo(
            name="transformers",
            versions={
                "transformers": self.transformers.__version__,
                "torch": torch.__version__,
            },
            dtype=dtype,
            compute_dtype=dtype,
            device=device_of(self.model.device),
            threads=torch.get_num_threads(),
        )

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        lengths = empty_lengths(self.config, batch_size, capacity)
        # Without a config, all layers keep all tokens, so every key can be compared.
        caches = [self.transformers.DynamicCache() for _ in range(batch_size)]
        return TransformersCache(caches, lengths, capacity)

    @torch.inference_mode()
    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        assert isinstance(cache, TransformersCache)
        check_step(cache, input_ids, num_logits, row)
        count, new = input_ids.shape
        found = []
        for index, r in enumerate(range(row, row + count)):
            output = self.model(
                input_ids=torch.from_numpy(input_ids[index : index + 1]),
                past_key_values=cache.caches[r],
                use_cache=True,
                logits_to_keep=num_logits_to_keep(num_logits, new),
            )
            cache.lengths[r] += new
            found.append(output.logits[..., : self.vocab_size].float().numpy())
        return np.concatenate(found)
