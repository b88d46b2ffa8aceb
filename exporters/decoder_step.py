"""The module that exporters trace: the reference model behind the signature of a decoder step.

All exporters trace this wrapper, so all graphs have the same inputs and outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma3_export.config import Gemma3Config
from gemma3_export.reference.model import Gemma3

__all__ = ["DecoderStep", "dynamic_shapes", "example_inputs"]


class DecoderStep(nn.Module):
    """One cached decoder step with flat inputs and outputs, in the signature's order."""

    def __init__(self, model: Gemma3) -> None:
        super().__init__()
        self.decoder = model  # must be named like bundle.signature.MODEL_PREFIX

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
        num_logits_to_keep: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return logits, then the extended cache.

        Like the outputs after the logits, ``past`` alternates key and value, layer by layer.
        """
        pairs = list(zip(past[::2], past[1::2], strict=True))
        output = self.decoder(
            input_ids, attention_mask, pairs, num_logits_to_keep=num_logits_to_keep
        )
        return (output.logits, *(tensor for pair in output.past_key_values for tensor in pair))


def example_inputs(
    config: Gemma3Config,
    *,
    batch: int = 2,
    new: int = 3,
    past: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Return inputs for tracing; sizes differ, so that the tracer does not confuse axes."""
    cache = (batch, config.num_key_value_heads, past, config.head_dim)
    return (
        torch.zeros(batch, new, dtype=torch.int64),  # the one token that every vocabulary has
        torch.ones(batch, past + new, dtype=torch.int64),
        [torch.zeros(cache, dtype=dtype) for _ in range(2 * config.num_hidden_layers)],
        torch.zeros(1, dtype=torch.int64),
    )


def dynamic_shapes(config: Gemma3Config) -> tuple[Any, ...]:
    """Return torch.export's ``dynamic_shapes`` for a step: dynamic batch size and lengths."""
    dim = torch.export.Dim
    batch, new, past = dim("batch_size"), dim("sequence_length"), dim("past_sequence_length")
    caches = [{0: batch, 2: past}] * (2 * config.num_hidden_layers)
    return ({0: batch, 1: new}, {0: batch, 1: dim.DYNAMIC}, caches, None)
