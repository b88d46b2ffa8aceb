"""A cache whose sliding layers hold their window and a margin, however long the text is.

GroupQueryAttention lets go of old tokens itself (``sliding_window_cache``). Its contract: with a
capacity C, a window W and G = C - W + 1, a row of T tokens holds the newest

    L(T) = T                          if T <= C
           T - G * ceil((T - C) / G)  otherwise

of them, in order, from the start of its buffer. Full layers keep everything, as in ``SharedCache``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma3_export.bundle.signature import Signature, window_capacity
from gemma3_export.config.gemma3_config import Gemma3Config
from gemma3_export.device import Device
from gemma3_export.errors import InputError
from gemma3_export.runtimes.onnx.caches import SharedCache
from gemma3_export.runtimes.protocol import LayerKV, check_truncation

__all__ = ["WindowedCache"]


@dataclass(frozen=True, slots=True)
class LetGo:
    """What a step pushed out of one row's windows, for a cut that wants it back."""

    first: int  # position of the first token
    until: int  # position after the last one
    tensors: dict[int, Any]  # buffer -> [K, until - first, H]


class WindowedCache(SharedCache):
    """Preallocated buffers, those of sliding layers no longer than a window and a margin.

    Tokens can be cut off as far back as a row's last step began, if that step was of its own and
    no longer than the window, and otherwise as far as nothing has been let go of since.
    """

    def __init__(
        self,
        config: Gemma3Config,
        signature: Signature,
        device: Device,
        batch_size: int,
        capacity: int,
    ) -> None:
        self.window_capacity = window_capacity(config)  # C
        self.group = self.window_capacity - config.sliding_window + 1  # G
        self.is_sliding = [
            config.is_sliding(layer) for layer in range(config.num_hidden_layers) for _ in "kv"
        ]
        self.let_go: dict[int, LetGo] = {}  # by row, of the last step
        super().__init__(config, signature, device, batch_size, capacity)

    def tensor_capacity(self, index: int) -> int:
        """See :class:`SharedCache`."""
        return self.window_capacity if self.is_sliding[index] else self.capacity

    def first_held(self, length: int) -> int:
        """Position of the oldest token that a sliding layer holds of a row of ``length``."""
        over = length - self.window_capacity
        return 0 if over <= 0 else self.group * -(-over // self.group)

    def begin(self, new_tokens: int, row: int | None) -> None:
        """Keep what a draft's step will push out, since the draft may be wrong."""
        if row is None and self.batch_size > 1:
            self.let_go.clear()
            return
        row = row or 0
        self.let_go.pop(row, None)
        length = int(self.lengths[row])
        first, until = self.first_held(length), self.first_held(length + new_tokens)
        if first < until <= length and new_tokens > 1:
            tensors = {
                index: self.arrays[index][row, :, : until - first].copy()
                for index, sliding in enumerate(self.is_sliding)
                if sliding
            }
            self.let_go[row] = LetGo(first, until, tensors)

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`.

        Raises:
            InputError: the row does not hold so many tokens, or its window has gone on too far.
        """
        check_truncation(self, row, length)
        held, wanted = self.first_held(int(self.lengths[row])), self.first_held(length)
        if length and held != wanted:
            self._bring_back(row, held, wanted, length)
        self.lengths[row] = length
        self.let_go.pop(row, None)

    def _bring_back(self, row: int, held: int, wanted: int, length: int) -> None:
        """Let the windows begin at ``wanted`` again instead of ``held``."""
        lost = self.let_go.get(row)
        if lost is None or lost.until != held or lost.first > wanted:
            raise InputError(
                f"row {row} holds {self.lengths[row]} tokens, and its sliding layers no longer "
                f"hold what a cut to {length} needs; open the runtime with windowed=False to cut "
                "as far back as you like"
            )
        for index, tensor in lost.tensors.items():
            buffer = self.arrays[index][row]
            kept = buffer[:, : max(0, length - held)]
            both = np.concatenate((tensor[:, wanted - lost.first :], kept), axis=1)
            buffer[:, : both.shape[1]] = both

    def read(self, row: int) -> list[LayerKV]:
        """One (key, value) a layer, each [K, L, H] float32; of sliding layers the newest L."""
        length = int(self.lengths[row])
        held = length - self.first_held(length)
        counts = [held if sliding else length for sliding in self.is_sliding]
        return self._read(row, counts)
