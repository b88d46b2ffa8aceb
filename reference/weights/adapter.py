"""Merge a LoRA adapter of PEFT into the weights of its base model while they are read.

Every tensor is merged in float32 as ``peft`` does it: ``W + s B A``, and with DoRA ``m (W + s B A)
/ |W + s B A|``, where the norm is that of each output.

Where ``merge_and_unload`` and the forward pass of ``peft`` disagree, the forward pass counts: if
only the embedding of a tied model has factors, merging them into the shared matrix would change
the head, which was trained without them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemma3_export.config import EMBEDDING, HEAD
from gemma3_export.reference.weights.adapter_folder import Adapter
from gemma3_export.reference.weights.adapter_plan import AdapterPlan, Update
from gemma3_export.reference.weights.source import WeightSource

__all__ = ["AdapterSource"]

logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 * 2**20  # of an embedding or head that is merged at once


class AdapterSource(WeightSource):
    """The weights of a base model with an adapter merged in, in float32.

    Args:
        base: the weights that the adapter was trained on; closing this source closes them.
        adapter: the adapter; closing this source closes it.

    Raises:
        InputError: the adapter does not fit the base; the message names the tensors.
    """

    def __init__(self, base: WeightSource, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.origin = f"{base.origin} with {adapter.origin}"
        plan = AdapterPlan(base, adapter)
        self.config = plan.config
        self.skipped = (*base.skipped, *plan.skipped)
        self._updates = plan.updates
        self._stored_rows, self._lacks_tokenizer = plan.stored_rows, plan.lacks_tokenizer
        self._merged: tuple[str, int, torch.Tensor] | None = None  # the block read last
        self._norms: dict[str, torch.Tensor] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See :meth:`WeightSource.read`."""
        start, stop = self._row_range(name, start, stop)
        if name not in self._updates:
            return self._base_rows(name, start, stop)
        shape = self._shape(name)
        step = self._block_rows(name)
        rows = torch.empty((stop - start, *shape[1:]))
        for first in range(start - start % step, stop, step):
            block = self._block(name, first, min(first + step, shape[0]))
            low, high = max(start, first), min(stop, first + len(block))
            rows[low - start : high - start] = block[low - first : high - first]
        return rows

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :meth:`WeightSource.stored_dtype`; merged weights are float32."""
        self._shape(name)
        return torch.float32

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`WeightSource.fingerprint`; ``files`` lists the adapter's files as well."""
        base, adapter = self.base.fingerprint(), self.adapter.fingerprint()
        files = adapter.pop("files")
        return base | {"files": base["files"] | files, "adapter": adapter}

    def tokenizer_file(self) -> Path | None:
        """Return the tokenizer that was saved with the adapter, else that of the base."""
        if self._lacks_tokenizer:
            logger.warning(
                "%s has %d embedding rows, but no tokenizer, and the base's names only %d; if "
                "tokens were added in training, pass the tokenizer that has them (--tokenizer)",
                self.adapter.origin,
                self._stored_rows,
                self.config.vocab_size,
            )
        return self.adapter.tokenizer_file() or self.base.tokenizer_file()

    def generation_config(self) -> Mapping[str, Any] | None:
        """See :meth:`WeightSource.generation_config`; it is that of the base."""
        return self.base.generation_config()

    def keep_rows(self, rows: int) -> None:
        """See :meth:`WeightSource.keep_rows`."""
        if rows <= self.config.vocab_size or rows > (self._stored_rows or rows):
            return
        tables = (EMBEDDING, self.config.head_name)
        if any(self._updates.get(name, Update()).base is None for name in tables):
            self.base.keep_rows(rows)
            if self.base.config.vocab_size < rows:
                return
        self.config = replace(self.config, vocab_size=rows)
        self._merged = None  # its last block may end too early
        self.__dict__.pop("_shapes", None)  # follow from the config

    def close(self) -> None:
        """See :meth:`WeightSource.close`."""
        self._merged = None
        self.adapter.store.close()
        self.base.close()

    def _block_rows(self, name: str) -> int:
        """Return how many rows are merged at once, so that no read depends on its range."""
        shape = self._shape(name)
        if name not in (EMBEDDING, HEAD):
            return shape[0]  # one product, as peft computes it
        return max(1, BLOCK_BYTES // (4 * shape[1]))

    def _block(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return the merged rows [first, last), which are one block."""
        if self._merged is None or self._merged[:2] != (name, first):
            self._merged = (name, first, self._merge(name, first, last))
        return self._merged[2]

    def _merge(self, name: str, first: int, last: int) -> torch.Tensor:
        update = self._updates[name]
        rows = self._base_rows(name, first, last)
        if update.factor_a is not None:
            changed = rows + self._change(update, first, last)
            if update.magnitude is None:
                rows = changed
            else:
                magnitude = self._whole(update.magnitude).reshape(-1)
                if update.is_embedding:
                    rows = (magnitude / self._column_norms(name, update)) * changed
                else:
                    norms = torch.linalg.norm(changed, dim=1)
                    rows = (magnitude[first:last] / norms).view(-1, 1) * changed
        if update.rows:
            rows = rows.clone()  # reads may share the memory of the file
            for index, row in enumerate(update.rows):
                if first <= row < last:
                    rows[row - first] = self._stored(update.tokens, index, index + 1)[0]
        return rows

    def _change(self, update: Update, first: int, last: int) -> torch.Tensor:
        """Return the rows [first, last) of the scaled product of the factors."""
        factor_a, factor_b = self._whole(update.factor_a), self._whole(update.factor_b)
        if update.is_embedding:
            return (factor_b @ factor_a[:, first:last]).T * update.scaling
        return (factor_b[first:last] @ factor_a) * update.scaling

    def _column_norms(self, name: str, update: Update) -> torch.Tensor:
        """Return the norm of every column of an embedding, [columns]."""
        if name not in self._norms:
            rows, columns = self._shape(name)
            squares = torch.zeros(columns, dtype=torch.float64)
            step = self._block_rows(name)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                block = self._base_rows(name, first, last) + self._change(update, first, last)
                squares += block.double().square().sum(dim=0)
            self._norms[name] = squares.sqrt().float()
        return self._norms[name]

    def _base_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return rows before merging, in float32; rows that only tokens define are zero."""
        update = self._updates.get(name, Update())
        if update.base is not None:
            return self._stored(update.base, first, last)
        config = self.base.config
        source = config.head_name if name == HEAD else name
        known = config.vocab_size if name in (EMBEDDING, HEAD) else last
        rows = self.base.read(source, min(first, known), min(last, known)).float()
        if last > known:
            missing = torch.zeros((last - max(first, known), *rows.shape[1:]))
            rows = torch.cat([rows, missing])
        return rows

    def _whole(self, stored: str | None) -> torch.Tensor:
        assert stored is not None
        return self._stored(stored, 0, self.adapter.store.tensors[stored].shape[0])

    def _stored(self, stored: str | None, first: int, last: int) -> torch.Tensor:
        assert stored is not None
        return self.adapter.store.read(stored, first, last).float().contiguous()
