"""Weights with the embedding rows of a reduced vocabulary, sliced while they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma3_export.bundle import BlockFormat
from gemma3_export.config import EMBEDDING, HEAD
from gemma3_export.errors import InputError
from gemma3_export.gguf_file import GgufTensor
from gemma3_export.reference.weights.source import WeightSource
from gemma3_export.tokenizer import Tokenizer, load_tokenizer
from gemma3_export.tokenizer.vocabulary import Reduction, reduce_tokenizer

__all__ = ["ReducedSource", "reduce_as_recorded", "reduce_vocabulary"]

# Token ids in generation_config.json; those of pad, bos and eos come from the config.
RENUMBERED_KEYS = ("suppress_tokens", "begin_suppress_tokens")
TOKEN_KEYS = (
    *("bad_words_ids", "decoder_start_token_id", "force_words_ids", "forced_bos_token_id"),
    *("forced_decoder_ids", "forced_eos_token_id", "sequence_bias"),
)
SPAN_ROWS = 4096  # rows of the full embedding that are read at once


class ReducedSource(WeightSource):
    """A model that has only the rows of the kept tokens in its embedding and head.

    Args:
        base: the full model; closing this source closes it.
        reduction: the reduced tokenizer of the model.

    Attributes:
        tokenizer: the reduced tokenizer.
    """

    def __init__(self, base: WeightSource, reduction: Reduction) -> None:
        config = base.config
        self.base, self.reduction, self.tokenizer = base, reduction, reduction.tokenizer
        self.origin, self.skipped = base.origin, base.skipped
        self._kept = torch.tensor(reduction.kept_ids)
        pad, bos, *eos = reduction.new_ids(
            (config.pad_token_id, config.bos_token_id, *config.eos_token_id)
        )
        self.config = replace(
            config,
            vocab_size=len(self._kept),
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=tuple(eos),
        )

    @property
    def activation_blocks(self) -> Mapping[str, BlockFormat]:
        """See :attr:`WeightSource.activation_blocks`."""
        return self.base.activation_blocks

    @property
    def smoothing(self) -> Mapping[str, torch.Tensor]:
        """See :attr:`WeightSource.smoothing`."""
        return self.base.smoothing

    @property
    def saved_parameters(self) -> int:
        """Return how many parameters the full model has more."""
        return self.base.config.num_parameters - self.config.num_parameters

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See :meth:`WeightSource.read`."""
        start, stop = self._row_range(name, start, stop)
        if name not in (EMBEDDING, HEAD):
            return self.base.read(name, start, stop)
        shape = (stop - start, self.config.hidden_size)
        rows = torch.empty(shape, dtype=self.stored_dtype(name))
        kept = self._kept[start:stop]
        done = 0
        while done < len(kept):
            first = int(kept[done])
            end = int(torch.searchsorted(kept, first + SPAN_ROWS))
            wanted = kept[done:end]
            span = self.base.read(name, first, int(wanted[-1]) + 1)
            rows[done:end] = span[wanted - first]
            done = end
        return rows

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :meth:`WeightSource.stored_dtype`."""
        return self.base.stored_dtype(name)

    def gguf_tensor(self, name: str) -> GgufTensor | None:
        """See :meth:`WeightSource.gguf_tensor`."""
        tensor = self.base.gguf_tensor(name)
        if tensor is None or name not in (EMBEDDING, HEAD):
            return tensor
        data = tensor.data[np.asarray(self.reduction.kept_ids)]
        shape = (len(self._kept), *tensor.shape[1:])
        return replace(tensor, data=data, shape=shape, n_bytes=data.nbytes)

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`WeightSource.fingerprint`; also returns what was kept."""
        ids = self.reduction.kept_ids
        reduced = {
            "by": self.reduction.about,
            "tokens": len(ids),
            "of": self.base.config.vocab_size,
            "kept_ids_sha256": _ids_sha256(ids),
        }
        return self.base.fingerprint() | {"reduced_vocabulary": reduced}

    def tokenizer_file(self) -> Path | None:
        """Return None: :attr:`tokenizer` is in no file."""
        return None

    def generation_config(self) -> Mapping[str, Any] | None:
        """See :meth:`WeightSource.generation_config`; token ids are the new ones.

        Raises:
            InputError: it has a setting of token ids that cannot be renumbered.
        """
        found = self.base.generation_config()
        if found is None:
            return None
        new_ids = {old: new for new, old in enumerate(self.reduction.kept_ids)}
        changed = dict(found)
        for key, value in found.items():
            if key in RENUMBERED_KEYS and isinstance(value, list):
                changed[key] = [new_ids[token_id] for token_id in value if token_id in new_ids]
            elif key in TOKEN_KEYS and value is not None:
                raise InputError(
                    f"{key} in generation_config.json is {value!r:.60}, token ids that "
                    "--reduce-vocab does not renumber; remove it"
                )
        return changed

    def close(self) -> None:
        """See :meth:`WeightSource.close`."""
        self.base.close()


def reduce_as_recorded(
    source: WeightSource, recorded: Mapping[str, Any], tokenizer: Tokenizer
) -> ReducedSource:
    """Keep the tokens that a bundle kept.

    Args:
        source: the full model.
        recorded: the entry ``reduced_vocabulary`` of the fingerprint of the bundle's weights.
        tokenizer: the bundle's tokenizer.

    Raises:
        InputError: these are not the tokens that were kept, or ``source`` has no tokenizer.
    """
    file = source.tokenizer_file()
    if file is None:
        raise InputError(
            f"{source.origin} has no tokenizer, so the tokens that the bundle kept cannot be found "
            "in it; pass a folder with both"
        )
    full = load_tokenizer(file)
    source.keep_rows(full.vocab_size)
    found = full.ids_of(tokenizer)
    kept = tuple(token_id for token_id in found if token_id is not None)
    if _ids_sha256(kept) != recorded.get("kept_ids_sha256") or len(kept) < len(found):
        raise InputError(
            f"the vocabulary of the bundle is not {recorded.get('tokens')} tokens of "
            f"{source.origin}; pass the weights and the tokenizer that it was made from"
        )
    source.keep_rows(kept[-1] + 1)
    about = str(recorded.get("by"))
    return ReducedSource(source, Reduction(tokenizer=tokenizer, kept_ids=kept, about=about))


def _ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).hexdigest()


def reduce_vocabulary(
    source: WeightSource, request: Path | str, tokenizer: Tokenizer | None = None
) -> ReducedSource:
    """Keep only the tokens that a corpus or a list of languages and scripts needs.

    Args:
        source: the full model.
        request: a UTF-8 text file, or languages and scripts such as ``en,de`` or ``latin,greek``.
        tokenizer: the model's tokenizer; None takes the one that came with the weights.

    Raises:
        InputError: the tokenizer is missing or does not fit, or the request is unknown.
    """
    if tokenizer is None:
        file = source.tokenizer_file()
        if file is None:
            raise InputError(
                f"{source.origin} has no tokenizer, so its vocabulary cannot be reduced; pass "
                "--tokenizer"
            )
        tokenizer = load_tokenizer(file)
    source.keep_rows(tokenizer.vocab_size)
    config = source.config
    tokenizer.check_vocab_size(config.vocab_size)
    reduction = reduce_tokenizer(
        tokenizer,
        str(request),
        vocab_size=config.vocab_size,
        needed_ids=(config.pad_token_id, config.bos_token_id, *config.eos_token_id),
    )
    return ReducedSource(source, reduction)
