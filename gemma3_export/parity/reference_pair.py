"""Run the reference in float64 and in the precision of a runtime, with one layer in memory.

The float64 weights of a whole model would take twice the memory of its float32 export. Each layer
is therefore read once, converted to float64, copied to the other precision, run on all sequences
and released, and the head is processed in blocks of vocabulary rows.

Shapes: S tokens, P positions, D hidden size, V vocabulary, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gemma3_export.parity.differences import vocabulary_blocks
from gemma3_export.parity.rounding import widen_residual
from gemma3_export.reference.loading import LayerwiseForward
from gemma3_export.reference.weights import WeightSource, check_finite

__all__ = ["ReferencePair", "head_blocks"]

CHUNK_BYTES = 2**23  # of stored weights; dequantizing them takes several times as much


class ReferencePair:
    """Two uncached forward passes over the same batches, layer by layer.

    :meth:`layers` yields each layer once both passes have loaded it, and the caller steps them.

    Args:
        source: canonical weights.
        batches: token ids [S] of each sequence.
        dtype: the precision of the second pass.
        has_wide_residual: keep its residual stream in float32 when ``dtype`` is half precision.
        resampled: token ids [S] of sequences that the second pass runs once more, after those of
            ``batches``, from embeddings that differ by their rounding.
    """

    def __init__(
        self,
        source: WeightSource,
        batches: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        has_wide_residual: bool = False,
        resampled: Sequence[Tensor] = (),
    ) -> None:
        self.source, self.dtype = source, dtype
        rows = [ids[None] for ids in batches]
        again = [ids[None] for ids in resampled]
        self.exact = LayerwiseForward(source, rows, dtype=torch.float64)
        # float64 holds every stored dtype exactly, so a copy equals rounding the source itself.
        self.rounded = LayerwiseForward(source, [*rows, *again], dtype=dtype, copies=self.exact)
        for batch in range(len(rows), len(rows) + len(again)):
            self.rounded.states[batch] = with_other_rounding(self.rounded.states[batch], batch)
        if has_wide_residual:
            widen_residual(self.rounded.model)
            self.rounded.states = [states.float() for states in self.rounded.states]

    @property
    def passes(self) -> tuple[LayerwiseForward, LayerwiseForward]:
        """The exact and the rounded pass."""
        return self.exact, self.rounded

    def layers(self) -> Iterator[int]:
        """Yield the index of each layer while it is loaded in both precisions.

        Raises:
            InputError: a weight holds NaN or infinity, or the source cannot be read.
        """
        for (index, _), _ in zip(self.exact.layers(), self.rounded.layers(), strict=True):
            yield index

    def normed(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the input [S, D] of the head for each batch, exact and rounded (and again).

        Raises:
            InputError: a weight holds NaN or infinity, or the source cannot be read.
        """
        exact, rounded = (
            (forward.final_norm(), [states[0] for states in forward.states])
            for forward in self.passes
        )
        return [exact[0](x) for x in exact[1]], [rounded[0](x) for x in rounded[1]]


def with_other_rounding(states: Tensor, seed: int) -> Tensor:
    """Return ``states`` changed by at most half a unit in the last place, and rounded again."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(states.shape, generator=generator, dtype=torch.float64) * 2 - 1
    limit = torch.finfo(states.dtype).eps / 2
    return (states.double() * (1 + limit * errors)).to(states.dtype)


def head_blocks(source: WeightSource, positions: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first token and the float64 rows [v, D] of each block of the head's matrix.

    Args:
        source: canonical weights.
        positions: the number of positions whose logits will be computed at once.

    Raises:
        InputError: a weight holds NaN or infinity, or the source cannot be read.
    """
    name, first = source.config.head_name, 0
    for chunk in source.chunks(name, CHUNK_BYTES):
        check_finite(name, chunk)
        for rows in vocabulary_blocks(positions, len(chunk)):
            yield first + rows.start, chunk[rows].double()
        first += len(chunk)
