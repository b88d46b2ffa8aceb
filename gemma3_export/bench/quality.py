"""Quality beside speed: how far a candidate's logits lie from full precision.

The text is what every installation of Python has (its documentation and its library's source), and
the short multilingual texts of the parity check: nothing that a quantiser has been tuned on here.
"""

from __future__ import annotations

import importlib
import inspect
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch

from gemma3_export.bench.process import Worker, own_worker
from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.parity.differences import LogitDifference, compare_logits
from gemma3_export.parity.sequences import TEXTS
from gemma3_export.tokenizer import Tokenizer

__all__ = ["held_out_sequences", "measure_quality"]

TOKENS = 192  # of each text, with bos
DOCUMENTS = ("import", "exceptions", "typesseq")  # topics of `help()`
MODULES = ("heapq", "argparse")


def measure_quality(
    bundle: Bundle, workers: Sequence[Worker], weights: str, threads: int
) -> dict[str, dict[str, float]]:
    """Mean divergence from the reference in float32 with ``weights``, by candidate.

    Args:
        bundle: its tokenizer makes the tokens.
        workers: loaded candidates.
        weights: full precision, as :func:`gemma3_export.api.exporting.open_weights` takes it.
        threads: of the reference.

    Raises:
        InputError: the bundle has no tokenizer.
    """
    if not (bundle.path / "tokenizer.json").exists():
        raise InputError(f"{bundle.path} has no tokenizer.json, which the quality's text needs")
    sequences = held_out_sequences(Tokenizer.from_folder(bundle.path), bundle.config.bos_token_id)
    asked = {"name": "truth", "weights": weights, "threads": threads}
    found: dict[str, list[LogitDifference]] = {worker.name: [] for worker in workers}
    with (
        tempfile.TemporaryDirectory(prefix="gemma3-quality-") as folder,
        own_worker("truth", asked) as truth,
    ):
        file = Path(folder) / "logits.npy"
        for ids in sequences:
            expected = read_logits(truth, ids, file)
            following = [*ids[1:], -1]
            for worker in workers:
                logits = read_logits(worker, ids, file)
                found[worker.name].append(compare_logits(expected, logits, following))
    return {name: describe_quality(parts) for name, parts in found.items()}


def held_out_sequences(tokenizer: Tokenizer, bos_token_id: int) -> list[list[int]]:
    """The texts' token ids, ``TOKENS`` at most of each."""
    texts = [topics.topics[name] for name in DOCUMENTS]
    texts += [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    texts.append(" ".join(TEXTS.values()))
    return [[bos_token_id, *tokenizer.encode_ordinary(text)][:TOKENS] for text in texts]


def read_logits(worker: Worker, ids: Sequence[int], file: Path) -> torch.Tensor:
    """Logits [T, V] of one candidate."""
    worker.write_logits(ids, file)
    logits = torch.from_numpy(np.load(file))
    file.unlink()
    if logits.shape[0] != len(ids):
        raise InputError(f"{worker.name} gave {logits.shape[0]} logits for {len(ids)} tokens")
    return logits


def describe_quality(parts: Sequence[LogitDifference]) -> dict[str, float]:
    """Divergence in nats, agreement of the first choice, and perplexity against the truth's."""
    all_of = LogitDifference.join(parts)
    known = np.isfinite(all_of.nll_truth)
    return {
        "positions": len(all_of.kld),
        "mean_kld": float(all_of.kld.mean()),
        "top1_agreement": float(all_of.is_same_top1.mean()),
        "perplexity_ratio": math.exp(float((all_of.nll - all_of.nll_truth)[known].mean())),
    }
