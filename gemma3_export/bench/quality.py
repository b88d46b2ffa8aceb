"""Measure how far candidates' logits diverge from full precision.

The texts are part of every Python installation (topics of its documentation, and source of its
library), plus the short multilingual texts of the parity check. Nothing was calibrated on them.
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
from gemma3_export.bench.worker import FULL_PRECISION
from gemma3_export.bundle import Bundle
from gemma3_export.config import TOKENIZER_NAME
from gemma3_export.errors import InputError
from gemma3_export.parity.differences import LogitDifference, compare_logits
from gemma3_export.parity.sequences import TEXTS
from gemma3_export.tokenizer import Tokenizer

__all__ = ["benchmark_texts", "measure_divergence"]

TOKENS = 192  # at most, per text, including BOS
DOCUMENTS = ("import", "exceptions", "typesseq")  # topics of `help()`
MODULES = ("heapq", "argparse")


def measure_divergence(
    bundle: Bundle, workers: Sequence[Worker], weights: str, threads: int
) -> dict[str, dict[str, float]]:
    """Compare every candidate with the float32 reference model, and return figures by candidate.

    Args:
        bundle: its tokenizer encodes the texts.
        workers: loaded candidates.
        weights: full precision, as :func:`gemma3_export.api.exporting.open_weights` takes it.
        threads: intra-op threads of the reference model.

    Raises:
        InputError: the bundle has no tokenizer.
    """
    if not (bundle.path / TOKENIZER_NAME).exists():
        raise InputError(
            f"{bundle.path} has no tokenizer.json, which --weights needs to encode its texts; "
            "export with a tokenizer, or leave out --weights"
        )
    sequences = benchmark_texts(Tokenizer.from_folder(bundle.path), bundle.config.bos_token_id)
    request = {"name": FULL_PRECISION, "weights": weights, "threads": threads}
    found: dict[str, list[LogitDifference]] = {worker.name: [] for worker in workers}
    with (
        tempfile.TemporaryDirectory(prefix="gemma3-quality-") as folder,
        own_worker(FULL_PRECISION, request) as reference,
    ):
        file = Path(folder) / "logits.npy"
        for ids in sequences:
            expected = read_logits(reference, ids, file)
            following = [*ids[1:], -1]
            for worker in workers:
                logits = read_logits(worker, ids, file)
                found[worker.name].append(compare_logits(expected, logits, following))
    return {name: summarize(parts) for name, parts in found.items()}


def benchmark_texts(tokenizer: Tokenizer, bos_token_id: int) -> list[list[int]]:
    """Encode the texts, and return at most ``TOKENS`` token ids of each."""
    texts = [topics.topics[name] for name in DOCUMENTS]
    texts += [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    texts.append(" ".join(TEXTS.values()))
    return [[bos_token_id, *tokenizer.encode_ordinary(text)][:TOKENS] for text in texts]


def read_logits(worker: Worker, ids: Sequence[int], file: Path) -> torch.Tensor:
    """Return a candidate's logits [T, V], float32; the worker passes them through ``file``.

    Raises:
        InputError: there is not one row for each token.
    """
    worker.write_logits(ids, file)
    logits = torch.from_numpy(np.load(file))
    file.unlink()
    if logits.shape[0] != len(ids):
        raise InputError(
            f"{worker.name} returned {logits.shape[0]} logits for {len(ids)} tokens; "
            "leave out --weights to measure it without them"
        )
    return logits


def summarize(parts: Sequence[LogitDifference]) -> dict[str, float]:
    """Return divergence in nats, top-1 agreement, and the ratio of perplexities."""
    joined = LogitDifference.join(parts)
    known = np.isfinite(joined.nll_expected)
    return {
        "positions": len(joined.kld),
        "mean_kld": float(joined.kld.mean()),
        "top1_agreement": float(joined.is_same_top1.mean()),
        "perplexity_ratio": math.exp(float((joined.nll - joined.nll_expected)[known].mean())),
    }
