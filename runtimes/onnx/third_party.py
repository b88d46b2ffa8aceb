"""Run a decoder graph that another tool made, behind the runtime protocol, to check it.

The graph is fed as its own tool would feed it: whole prompts, chunks, single tokens over a growing
or a preallocated cache, and batches. The cache is kept on the host, row by row, in float32 (which
holds every smaller type exactly) and is laid out again for each step. This is for comparison, not
for speed.

Shapes: B rows, T new tokens, P past tokens (with padding), K key-value heads, H head size, L held
tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.config import Gemma3Config
from gemma3_export.device import CudaOptions
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.runtimes.onnx.graph_file import PRECISION, GraphFile, open_graph_file
from gemma3_export.runtimes.onnx.graph_interface import GraphInput, GraphInterface, Role
from gemma3_export.runtimes.onnx.ort_values import as_float32, from_float32, run_graph
from gemma3_export.runtimes.onnx.session import (
    choose_device,
    first_line,
    import_onnxruntime,
    open_session,
)
from gemma3_export.runtimes.protocol import (
    NO_LOGITS,
    IntArray,
    KVCache,
    LayerKV,
    Logits,
    PaddingSide,
    RuntimeInfo,
    check_rows,
    check_step,
    check_truncation,
    empty_lengths,
)

__all__ = ["ThirdPartyCache", "ThirdPartyRuntime"]

FUSED_ATTENTION = "GroupQueryAttention"  # takes each row's length from the sum of its mask
Tensor = NDArray[np.float32]


class ThirdPartyCache:
    """Keys and values of each row, as the graph returned them last."""

    def __init__(self, config: Gemma3Config, batch_size: int, capacity: int, tensors: int) -> None:
        self.lengths: IntArray = empty_lengths(config, batch_size, capacity)
        self.capacity = capacity
        empty = np.zeros((config.num_key_value_heads, 0, config.head_dim), np.float32)
        # [K, L, H] each: the key and the value of each layer in turn
        self.rows: list[list[Tensor]] = [[empty] * tensors for _ in range(batch_size)]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.rows)

    def read(self, row: int) -> list[LayerKV]:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""
        return list(zip(self.rows[row][::2], self.rows[row][1::2], strict=True))

    def truncate(self, row: int, length: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""
        check_truncation(self, row, length)
        held = int(self.lengths[row])
        if length and any(tensor.shape[1] < held for tensor in self.rows[row]):
            raise InputError(f"row {row} has evicted tokens, so it cannot be cut to {length}")
        self.rows[row] = [tensor[:, :length] for tensor in self.rows[row]]
        self.lengths[row] = length

    def swap(self, row: int, other: int) -> None:
        """See :class:`gemma3_export.runtimes.protocol.KVCache`."""
        check_rows(self, row, other)
        self.rows[row], self.rows[other] = self.rows[other], self.rows[row]
        self.lengths[[row, other]] = self.lengths[[other, row]]


class ThirdPartyRuntime:
    """An ``.onnx`` file of another tool behind :class:`gemma3_export.runtimes.protocol.Runtime`.

    Args:
        path: the file.
        config: the model that it should be, from its weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads; None lets ONNX Runtime choose.
        cuda: options for the CUDA provider; ignored on the CPU.

    Raises:
        InputError: the file is not a graph of this model that can be fed, or is quantized.
        UnavailableError: a package or the device is missing.
    """

    def __init__(
        self,
        path: Path,
        config: Gemma3Config,
        *,
        device: str = "auto",
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        self.config = config
        self.file: GraphFile = open_graph_file(path)
        if quantized := self.file.quantized_operators:
            raise InputError(
                f"{path} is quantized (it has {', '.join(quantized)}), and how its tool rounds "
                "is unknown; verify a graph in fp32, fp16 or bf16"
            )
        self.device = choose_device(device)
        self.session = open_session(
            path, self.device, threads=threads, cuda=cuda, remedy="export the model again"
        )
        self.interface = GraphInterface.of_session(self.session, config)
        vocab_size = self.interface.vocab_size
        if vocab_size is not None and vocab_size < config.vocab_size:
            raise InputError(
                f"{path} has logits for {vocab_size} tokens, and the weights have "
                f"{config.vocab_size}; give the weights that it was made from"
            )
        roles = {item.role for item in self.interface.inputs}
        self.has_positions = "position_ids" in roles
        self.has_mask = "attention_mask" in roles
        self.counts_cache = "cache_position" in roles  # one position for all rows
        self.is_fused = FUSED_ATTENTION in self.file.operators
        # Tokens of shorter rows are at the start of the cache, not at its end.
        self.pads_right = self.interface.capacity is not None or (
            self.is_fused and not self.has_positions
        )
        precisions = {self.file.matrix_dtype, *(item.dtype for item in self.interface.cache)}
        dtype = next(item for item in PRECISION if item in precisions)
        self.info = RuntimeInfo(
            name="onnx",
            versions={"onnxruntime": import_onnxruntime().__version__},
            producer=self.file.producer,
            dtype=dtype,
            compute_dtype=dtype,
            device=self.device,
            providers=tuple(self.session.get_providers()),
            threads=threads,
        )

    @property
    def padding_side(self) -> PaddingSide | None:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`."""
        if not self.has_mask or self.interface.capacity or self._takes_single_tokens:
            return None
        return "right" if self.pads_right else "left"

    @property
    def _takes_single_tokens(self) -> bool:
        tokens = self.interface.input("input_ids")
        return tokens is not None and tokens.shape[1] == 1

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        return ThirdPartyCache(self.config, batch_size, capacity, len(self.interface.cache))

    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`.

        Rows that the graph cannot take together, such as of different lengths without
        ``position_ids``, run one by one, and so do the tokens of a graph that takes one at a time.
        """
        assert isinstance(cache, ThirdPartyCache)
        check_step(cache, input_ids, num_logits, row)
        rows = list(range(row, row + len(input_ids)))
        if num_logits == NO_LOGITS:  # which these graphs do not know
            return self.step(input_ids, cache, num_logits=1, row=row)[:, :0]
        keep = num_logits or input_ids.shape[1]
        if self._takes_single_tokens and input_ids.shape[1] > 1:
            steps = [
                self.step(input_ids[:, index : index + 1], cache, num_logits=1, row=row)
                for index in range(input_ids.shape[1])
            ]
            return np.concatenate(steps[-keep:], axis=1)
        if self._runs_together(input_ids, cache, rows):
            return self._step(input_ids, cache, rows, keep)
        parts = [
            self._step(input_ids[index : index + 1], cache, [each], keep)
            for index, each in enumerate(rows)
        ]
        return np.concatenate(parts)

    def _runs_together(self, input_ids: IntArray, cache: ThirdPartyCache, rows: list[int]) -> bool:
        lengths = cache.lengths[rows]
        if self.is_fused and input_ids.shape[1] > 1 and lengths.any():
            return False  # it takes several tokens after a past for one row at a time only
        if (lengths == lengths[0]).all():
            return True
        if self.interface.capacity or self.counts_cache or not self.has_mask:
            return False
        return self.has_positions or self.is_fused

    def _step(
        self, input_ids: IntArray, cache: ThirdPartyCache, rows: list[int], keep: int
    ) -> Logits:
        """Run rows together, and keep what the graph returns for each."""
        new, lengths = input_ids.shape[1], cache.lengths[rows]
        longest = int(lengths.max())
        starts = np.zeros_like(lengths) if self.pads_right else longest - lengths
        slots = np.arange(longest + new)
        mask = (slots >= starts[:, None]) & (slots < (starts + lengths + new)[:, None])
        positions = lengths[:, None] + np.arange(new)
        past = [
            self._joined([cache.rows[row][index] for row in rows])
            for index in range(len(self.interface.cache))
        ]
        logits, present = self._run(input_ids, mask, positions, past, longest, keep)
        for index, row in enumerate(rows):
            cache.rows[row] = [
                self._own(tensor, index, before, cache.rows[row][at].shape[1], new, at)
                for at, (tensor, before) in enumerate(zip(present, past, strict=True))
            ]
        cache.lengths[rows] += new
        return logits

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the rows' keys or values as one tensor [B, K, P, H], padded with zeros."""
        heads, _, size = tensors[0].shape
        held = max(tensor.shape[1] for tensor in tensors)
        length = self.interface.capacity or held
        if held > length:
            raise InputError(
                f"the graph's cache holds {length} tokens, and the check needs {held}; export it "
                "with a longer one"
            )
        joined = np.zeros((len(tensors), heads, length, size), np.float32)
        for row, tensor in zip(joined, tensors, strict=True):
            start = 0 if self.pads_right else length - tensor.shape[1]
            row[:, start : start + tensor.shape[1]] = tensor
        return joined

    def _own(
        self, present: Tensor, index: int, past: Tensor, held: int, new: int, at: int
    ) -> Tensor:
        """Return one row's tokens [K, L, H] of a present tensor [B, K, ., H].

        Raises:
            Gemma3ExportError: the tensor is neither as long as the past and the new tokens, nor a
                cache of fixed length, nor a sliding layer's window.
        """
        found = present.shape[2]
        row: Tensor = present[index].copy()
        if found == past.shape[2] + new:
            start = 0 if self.pads_right else past.shape[2] - held
            return row[:, start : start + held + new]
        if found == self.interface.capacity and held + new <= found:
            return row[:, : held + new]
        window = self.config.sliding_window - 1  # the next token belongs to its own window
        if self.config.is_sliding(at // 2) and window <= found < past.shape[2] + new:
            return row
        raise Gemma3ExportError(
            f"the graph's output {self.interface.cache[at].present} holds {found} tokens after "
            f"{held} cached and {new} new ones, so it is not the cache of the next step"
        )

    def run_padded(
        self, input_ids: IntArray, attention_mask: IntArray
    ) -> tuple[Logits, list[Tensor]]:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`.

        The present tensors are left out if the graph rotates keys by their place in the batch
        instead of their position, which changes all keys of a padded row and no logits.
        """
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
        past = [
            self._joined([tensor] * len(input_ids))
            for tensor in ThirdPartyCache(self.config, 1, 1, len(self.interface.cache)).rows[0]
        ]
        logits, present = self._run(
            input_ids, attention_mask != 0, positions, past, 0, input_ids.shape[1]
        )
        return logits, present if self.has_positions or self.is_fused else []

    def _run(
        self,
        input_ids: IntArray,
        mask: NDArray[np.bool_],
        positions: IntArray,
        past: Sequence[Tensor],
        first: int,
        keep: int,
    ) -> tuple[Logits, list[Tensor]]:
        """Run the graph once.

        Args:
            input_ids: [B, T].
            mask: [B, P + T], True for tokens.
            positions: [B, T] of the new tokens.
            past: [B, K, P, H] each.
            first: place of the first new token in the cache.
            keep: logits to return, of the last tokens.
        """
        new = input_ids.shape[1]
        values: dict[Role, Any] = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "cache_position": np.arange(first, first + new),
            "num_logits": keep,
            "window": self.config.sliding_window,
        }
        feeds = {item.name: _as_declared(values[item.role], item) for item in self.interface.inputs}
        for tensor, array in zip(self.interface.cache, past, strict=True):
            feeds[tensor.past] = from_float32(array, tensor.dtype)
        try:
            found = run_graph(self.session, self.interface.outputs, feeds)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise Gemma3ExportError(
                f"ONNX Runtime failed on a step of {new} tokens after {first} in "
                f"{self.file.path}: {first_line(error)}"
            ) from error
        logits, *present = map(as_float32, found)
        if logits.shape[:1] != input_ids.shape[:1] or logits.shape[1] < keep:
            raise Gemma3ExportError(
                f"{self.file.path} returned logits of the shape {list(logits.shape)} for a step of "
                f"{list(input_ids.shape)} tokens, and {keep} of each row are needed; export it "
                "with the logits of all tokens"
            )
        return logits[:, -keep:, : self.config.vocab_size], present


def _as_declared(value: Any, item: GraphInput) -> NDArray[Any]:
    """Return a value with the type and the rank that the graph declares.

    A mask is extended with zeros if the graph declares its length.
    """
    array = np.asarray(value, item.dtype)
    if item.role == "attention_mask" and isinstance(item.shape[1], int):
        array = np.pad(array, ((0, 0), (0, max(0, item.shape[1] - array.shape[1]))))
    if not array.ndim:
        array = array.reshape((1,) * len(item.shape))
    return np.ascontiguousarray(array) if array.ndim else array
